"use strict";
const by = (id) => document.getElementById(id);
const percent = (p) => (p === null ? "not known" : (100 * p).toFixed(p < 0.1 ? 1 : 0) + " %");
const reasons = {
  above_threshold: "It is less certain than what was guaranteed.",
  below_floor: "It is less certain than what was guaranteed.",
  outside: "The picture rather shows none of the classes.",
  not_certified: "Nothing was guaranteed for answers of this kind.",
};
let turn = 0;

const headers = () => (by("key").value ? { Authorization: "Bearer " + by("key").value } : {});

async function ask(path, options) {
  const reply = await fetch(path, { ...options, headers: headers() });
  const told = await reply.json();
  by("key-row").hidden = reply.status !== 401 && !by("key").value;
  if (!reply.ok) throw new Error(told.detail);
  return told;
}

function show(one) {
  by("answer").hidden = false;
  by("decision").className = one.decision || "";
  by("decision").textContent = { accept: "Accept", review: "Have a person look" }[one.decision] || "No rule: decide by the probability";
  by("label").textContent = one.label === null ? "none" : one.label;
  by("probability").textContent = percent(one.failure_probability);
  by("meter").value = one.failure_probability || 0;
  by("meter").hidden = one.failure_probability === null;
  by("reason").textContent = one.label === null ? "The picture cannot be read: " + one.reason : reasons[one.reason] || "";
  by("others").replaceChildren(
    ...one.runners_up.map((other) => {
      const row = document.createElement("tr");
      for (const text of [other.label, percent(other.probability)]) {
        row.appendChild(document.createElement("td")).textContent = text;
      }
      return row;
    }),
  );
}

async function send(file) {
  const mine = ++turn;
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
    const told = await ask("/v1/answers", { method: "POST", body: form });
    if (mine !== turn) return;
    show(told.answers[0]);
    about();
  } catch (error) {
    if (mine === turn) by("error").textContent = error.message;
  }
  by("hint").textContent = "Drop another photo here, paste one, or choose one (click, or the space bar).";
}

async function about() {
  try {
    const told = await ask("/v1/predictors", {});
    const now = told.predictors.find((one) => one.answers);
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
