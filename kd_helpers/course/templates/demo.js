import { env, pipeline } from "@huggingface/transformers";

// Everything comes from the folder beside the page.
env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = "demo/"; // relative: a full address is taken for a remote one
env.useWasmCache = false;
env.backends.onnx.wasm.wasmPaths = { wasm: new URL("demo/ort-wasm-simd-threaded.wasm", location).href };

const text = document.getElementById("text");
const status = document.getElementById("status");
const models = [];

function show(section, scores, milliseconds) {
  const rows = scores.map(({ label, score }) => {
    const row = document.createElement("tr");
    const bar = document.createElement("i");
    bar.style.width = `${100 * score}%`;
    row.dataset.score = score;
    row.append(document.createElement("th"), document.createElement("td"), document.createElement("td"));
    row.children[0].textContent = label;
    row.children[1].append(bar);
    row.children[2].textContent = `${Math.round(100 * score)}%`;
    return row;
  });
  section.querySelector(".answers").replaceChildren(...rows);
  section.querySelector(".time small").textContent = `${milliseconds.toFixed(1)} ms`;
}

let asked = 0;
async function answer() {
  const question = text.value.trim();
  const turn = ++asked;
  if (!question) return;
  for (const { classify, labels, section } of models) {
    const start = performance.now();
    const scores = await classify(question, { top_k: null });
    const milliseconds = performance.now() - start;
    if (turn !== asked) return; // something else was typed meanwhile
    show(section, labels.map((label) => scores.find((score) => score.label === label)), milliseconds);
  }
  document.body.dataset.answered = question;
}

for (const button of document.querySelectorAll(".example")) {
  button.addEventListener("click", () => {
    text.value = button.textContent;
    answer();
  });
}
text.addEventListener("input", answer);

try {
  for (const section of document.querySelectorAll("[data-model]")) {
    const classify = await pipeline("text-classification", section.dataset.model, { dtype: "q8", device: "wasm" });
    models.push({ classify, labels: Object.values(classify.model.config.id2label), section });
    await answer();
  }
  await answer(); // once more, now that all are warm: the first answer takes longer
  status.textContent = "";
  document.body.dataset.ready = "true";
} catch (error) {
  status.textContent = `The models can't be loaded: ${error.message}`;
  throw error;
}
