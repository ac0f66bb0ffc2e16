from kd_helpers.experiments import patience
from kd_helpers.experiments.statistics import mean_interval
w=patience.stored_patience(); b=patience.by_steps(w); best=patience.best_baseline(w)
print((100*b.groupby("steps").mean()).round(1)); print((100*best).round(2).to_dict())
def s(x): return "%+.1f (%+.1f to %+.1f)"%tuple(100*v for v in mean_interval(x.dropna()))
for st in patience.STEPS:
    f=b.loc[st]
    print(st,"t-best_epoch",s(f.tuned_teacher-f.best_epoch),"t-bestlen",s(f.tuned_teacher-best),"ts-t",s(f.transfer_set-f.tuned_teacher),"ts-bestlen",s(f.transfer_set-best),"best-last",s(f.best_epoch-f.baseline))
t=patience.by_texts(w); print({c:s(t[c]-t[0]) for c in t}); print(100*t.mean())
for a,c in [(14131,2500),(14131,7000),(7000,2500)]: print(a,c,s(t[a]-t[c]))
for arm in ("tuned_teacher","transfer_set","best_epoch"):
    print(arm,[(x,y,s(b[arm].loc[y]-b[arm].loc[x])) for x,y in zip(patience.STEPS,patience.STEPS[1:])])
for m in ("nll",):
    bb=patience.by_steps(w,m); print(m); print(bb.groupby("steps").mean().round(3))
for st in patience.STEPS:
    print(st,[ (r["seed"], max(r["history"],key=lambda e:e["accuracy"])["step"], round(max(e["accuracy"] for e in r["history"]),4)) for r in patience.runs_of(w,st) if r["arm"]=="best_epoch"])
