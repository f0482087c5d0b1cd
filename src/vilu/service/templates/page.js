"use strict";
const by = (id) => document.getElementById(id);
const percent = (p) => (p === null ? "not known" : (100 * p).toFixed(p < 0.1 ? 1 : 0) + " %");
const reasons = {
  above_threshold: "It is less certain than what was guaranteed.",
  below_floor: "Answers that seem as certain as this one are too often wrong.",
  outside: "The picture probably shows none of the classes.",
  not_certified: "No threshold was certified for this answer.",
};
let turn = 0;  // number of the latest photo: an older reply is not shown

const headers = () => (by("key").value ? { Authorization: "Bearer " + by("key").value } : {});

async function ask(path, options) {
  const reply = await fetch(path, { ...options, headers: headers() });
  const content = await reply.json();
  by("key-row").hidden = reply.status !== 401 && !by("key").value;
  if (!reply.ok) throw new Error(content.detail);
  return content;
}

function show(answer) {
  by("answer").hidden = false;
  by("decision").className = answer.decision || "";
  by("decision").textContent = { accept: "Accept", review: "Have a person look" }[answer.decision] || "No rule: decide by the probability";
  by("label").textContent = answer.label === null ? "none" : answer.label;
  by("zero-shot-row").hidden = answer.zero_shot === null;
  by("zero-shot").textContent = answer.zero_shot || "";
  by("probability").textContent =
    answer.quantile === null ? percent(answer.failure_probability) : `more doubtful than ${percent(answer.quantile)} of the photos`;
  by("meter").value = answer.failure_probability || 0;
  by("meter").hidden = answer.failure_probability === null;
  by("likely").hidden = answer.likely !== true;
  by("reason").textContent = answer.label === null ? "The picture cannot be read: " + answer.reason : reasons[answer.reason] || "";
  by("others").replaceChildren(
    ...answer.runners_up.map((runnerUp) => {
      const row = document.createElement("tr");
      for (const text of [runnerUp.label, percent(runnerUp.probability)]) {
        row.appendChild(document.createElement("td")).textContent = text;
      }
      return row;
    }),
  );
}

async function send(file) {
  const ownTurn = ++turn;
  by("error").textContent = "";
  by("answer").hidden = true;
  const photo = by("photo");
  if (photo.src) URL.revokeObjectURL(photo.src);
  photo.src = URL.createObjectURL(file);
  photo.alt = "The photo that you gave";
  photo.hidden = false;
  by("hint").textContent = "Asking…";
  const form = new FormData();
  form.append("images", file);
  try {
    const content = await ask("/v1/answers", { method: "POST", body: form });
    if (ownTurn !== turn) return;
    show(content.answers[0]);
    about();
  } catch (error) {
    if (ownTurn === turn) by("error").textContent = error.message;
  }
  by("hint").textContent = "Drop another photo here, paste one, or choose one (click, or the space bar).";
}

async function about() {
  try {
    const content = await ask("/v1/predictors", {});
    const now = content.predictors.find((predictor) => predictor.answers);
    by("guarantee").className = now.guarantee;
    by("guarantee").textContent = now.in_words;
  } catch (error) {
    by("guarantee").textContent = error.message;
  }
}

by("photo").onerror = () => { by("photo").hidden = true; };
by("file").onchange = (event) => { if (event.target.files[0]) send(event.target.files[0]); event.target.value = ""; };
by("drop").ondragover = (event) => { event.preventDefault(); by("drop").classList.add("over"); };
by("drop").ondragleave = () => by("drop").classList.remove("over");
by("drop").ondrop = (event) => {
  event.preventDefault();
  by("drop").classList.remove("over");
  if (event.dataTransfer.files[0]) send(event.dataTransfer.files[0]);
};
document.onpaste = (event) => { if (event.clipboardData.files[0]) send(event.clipboardData.files[0]); };
by("key").onchange = about;
about();
