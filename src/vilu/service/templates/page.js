"use strict";
const byId = (id) => document.getElementById(id);
const percent = (p) => (p === null ? "not known" : (100 * p).toFixed(p < 0.1 ? 1 : 0) + " %");
const reasons = {
  above_threshold: "It is less certain than what was guaranteed.",
  below_floor: "Answers that seem as certain as this one are too often wrong.",
  outside: "The picture probably shows none of the classes.",
  not_certified: "No threshold was certified for this answer.",
};
let latestPhoto = 0;  // number of the latest photo; a reply to an earlier photo is not shown

const keyHeaders = () => (byId("key").value ? { Authorization: "Bearer " + byId("key").value } : {});

async function ask(path, options) {
  const reply = await fetch(path, { ...options, headers: keyHeaders() });
  const content = await reply.json();
  byId("key-row").hidden = reply.status !== 401 && !byId("key").value;
  if (!reply.ok) throw new Error(content.detail);
  return content;
}

function show(answer) {
  byId("answer").hidden = false;
  byId("decision").className = answer.decision || "";
  byId("decision").textContent = { accept: "Accept", review: "Have a person look" }[answer.decision] || "No rule: decide by the probability";
  byId("label").textContent = answer.label === null ? "none" : answer.label;
  byId("zero-shot-row").hidden = answer.zero_shot === null;
  byId("zero-shot").textContent = answer.zero_shot || "";
  byId("probability").textContent =
    answer.quantile === null ? percent(answer.failure_probability) : `at least as doubtful as ${percent(answer.quantile)} of the photos`;
  byId("meter").value = answer.failure_probability || 0;
  byId("meter").hidden = answer.failure_probability === null;
  byId("likely").hidden = answer.likely !== true;
  byId("reason").textContent = answer.label === null ? "The picture cannot be read: " + answer.reason : reasons[answer.reason] || "";
  byId("others").replaceChildren(
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
  const thisPhoto = ++latestPhoto;
  byId("error").textContent = "";
  byId("answer").hidden = true;
  const photo = byId("photo");
  if (photo.src) URL.revokeObjectURL(photo.src);
  photo.src = URL.createObjectURL(file);
  photo.alt = "The photo that you gave";
  photo.hidden = false;
  byId("hint").textContent = "Asking…";
  const form = new FormData();
  form.append("images", file);
  try {
    const content = await ask("/v1/answers", { method: "POST", body: form });
    if (thisPhoto !== latestPhoto) return;
    show(content.answers[0]);
    showGuarantee();
  } catch (error) {
    if (thisPhoto === latestPhoto) byId("error").textContent = error.message;
  }
  byId("hint").textContent = "Drop another photo here, paste one, or choose one (click, or the space bar).";
}

async function showGuarantee() {
  try {
    const content = await ask("/v1/predictors", {});
    const answering = content.predictors.find((predictor) => predictor.answers);
    byId("guarantee").className = answering.guarantee;
    byId("guarantee").textContent = answering.in_words;
  } catch (error) {
    byId("guarantee").textContent = error.message;
  }
}

byId("photo").onerror = () => { byId("photo").hidden = true; };
byId("file").onchange = (event) => { if (event.target.files[0]) send(event.target.files[0]); event.target.value = ""; };
byId("drop").ondragover = (event) => { event.preventDefault(); byId("drop").classList.add("over"); };
byId("drop").ondragleave = () => byId("drop").classList.remove("over");
byId("drop").ondrop = (event) => {
  event.preventDefault();
  byId("drop").classList.remove("over");
  if (event.dataTransfer.files[0]) send(event.dataTransfer.files[0]);
};
document.onpaste = (event) => { if (event.clipboardData.files[0]) send(event.clipboardData.files[0]); };
byId("key").onchange = showGuarantee;
showGuarantee();
