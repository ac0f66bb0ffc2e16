# @title Figure: accuracy against the number of labels
curve = stored_study("label_curve")
counts = [int(count) for count in curve["choices"]["tasks"]]
looks = {
    "triple": ("student", "-"),
    "language": ("student", "--"),
    "none": ("baseline", "-"),
    "packaged": ("baseline", ":"),
}
figure, axis = plt.subplots(figsize=(7, 4.8))
described = []
for arm, (colour, style) in looks.items():
    found = [means(curve, f"labels_{count}_accuracy").loc[arm] for count in counts]
    middle, low, high = (100 * np.array([row[name] for row in found]) for name in ("mean", "low", "high"))
    axis.fill_between(counts, low, high, color=plots.COLOURS[colour], alpha=0.12)
    axis.plot(counts, middle, color=plots.COLOURS[colour], linestyle=style, marker="o", label=titles(curve)[arm])
    described.append(f"{titles(curve)[arm]} " + ", ".join(f"{value:.1f}" for value in middle))
axis.set_xscale("log")
axis.set_xticks(counts, [f"{count:,}" for count in counts])
axis.minorticks_off()
axis.legend(frameon=False)
axis.set(xlabel="labelled tweets", ylabel="accuracy on test, %")
plots.show(
    figure,
    caption="Accuracy after fine-tuning, means and 95% intervals over five seeds; below 2,500 labels, each seed draws its own tweets.",
    alt="Accuracy with 50, 100, 500 and 2,500 labels: " + "; ".join(described),
)
pairs = [("triple", "language"), ("language", "none"), ("triple", "none"), ("none", "packaged")]
rows = {}
for arm, over in pairs:
    row = rows.setdefault(f"{titles(curve)[arm]} −\n{titles(curve)[over]}", {})
    for count in counts:
        gain, low, high = 100 * gains(curve, f"labels_{count}_accuracy", over=over).loc[arm]
        row[f"{count:,}"] = f"{gain:+.1f} ({low:+.1f} to {high:+.1f})"
display(pd.DataFrame.from_dict(rows, orient="index"))
print("points of accuracy by number of labels, with 95% intervals over the seeds")
