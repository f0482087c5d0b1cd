"use strict";
const key = new URLSearchParams(location.search).get("key") || "";
const at = (id) => document.getElementById(id);
const state = { tasks: [], names: [], skip: "", index: 0, past: [] };

const ask = async (path, body) => {
  const answer = await fetch(`${path}?key=${encodeURIComponent(key)}`, body === undefined ? {} : {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  });
  const found = await answer.json();
  if (!answer.ok) throw new Error(found.detail || answer.statusText);
  return found;
};

const outsideName = () => state.names[state.names.length - 1];
const percent = (p) => `${(100 * p).toFixed(p < 0.1 ? 1 : 0)} % likely wrong`;

const showClasses = () => {
  const typed = at("filter").value.trim().toLowerCase();
  const task = state.tasks[state.index];
  const fitting = state.names.filter((name) => name.toLowerCase().includes(typed));
  fitting.sort((a, b) => b.toLowerCase().startsWith(typed) - a.toLowerCase().startsWith(typed));
  at("classes").replaceChildren(...fitting.slice(0, 200).map((name, i) => {
    const item = document.createElement("li");
    item.role = "option";
    item.textContent = name;
    item.setAttribute("aria-selected", String(task && task.label === name));
    if (typed && i === 0) item.className = "first";
    item.addEventListener("click", () => give(name));
    return item;
  }));
  return fitting;
};

const said = (task) => {
  if (task.answer === null) return "The model gives no answer.";
  if (task.zero_shot === null) return `The model says: ${task.answer}`;
  return `The model says: ${state.kind}: ${task.answer}; zero-shot: ${task.zero_shot}`;
};

const show = () => {
  const task = state.tasks[state.index];
  const answered = state.tasks.filter(({ label }) => label !== null).length;
  at("progress").textContent = `${answered} of ${state.tasks.length} answered; photo ${state.index + 1}`;
  at("bar").value = answered / state.tasks.length;
  at("done").hidden = answered < state.tasks.length;
  at("photo").hidden = false;
  at("missing").hidden = true;
  at("photo").src = `photo/${state.index}?key=${encodeURIComponent(key)}`;
  at("photo").alt = task.answer === null ? "Photo" : `Photo, which the model calls ${task.answer}`;
  at("path").textContent = task.path;
  at("said").replaceChildren(said(task));
  if (task.p !== null) {
    const small = document.createElement("small");
    small.textContent = percent(task.p);
    at("said").append(small);
  }
  at("accept").disabled = task.answer === null;
  at("accept-text").textContent = task.answer === null ? "No answer" : `Right: ${task.answer}`;
  at("second").hidden = task.second === null;
  at("second-text").textContent = task.second || "";
  at("undo").disabled = state.past.length === 0;
  for (const [id, label] of [["accept", task.answer], ["second", task.second], ["outside", outsideName()], ["skip", state.skip]])
    at(id).setAttribute("aria-pressed", String(label !== null && task.label === label));
  at("filter").value = "";
  showClasses();
  const next = state.tasks[state.index + 1];
  if (next) new Image().src = `photo/${state.index + 1}?key=${encodeURIComponent(key)}`;
};

const go = (index) => {
  state.index = Math.max(0, Math.min(state.tasks.length - 1, index));
  show();
};

const forward = () => {
  const open = (i) => state.tasks[i].label === null;
  const order = [...state.tasks.keys()];
  const next = order.slice(state.index + 1).find(open) ?? order.find(open);
  go(next === undefined ? state.index : next);
};

// One action at a time. The next photo is shown once the answer is saved. Until then keys are ignored, since the user has
// not seen the next photo yet.
let busy = false;
const inTurn = async (work) => {
  if (busy) return;
  busy = true;
  try {
    await work();
  } catch (error) {
    at("error").textContent = `Not saved: ${error.message}`;
  } finally {
    busy = false;
  }
};

const give = (label) => inTurn(async () => {
  const index = state.index, task = state.tasks[index];
  if (label === null) return;
  await ask("answer", { index, label });
  at("error").textContent = "";
  state.past.push([index, task.label]);
  task.label = label;
  forward();
});

const undo = () => inTurn(async () => {
  const last = state.past[state.past.length - 1];
  if (last === undefined) return;
  await ask("answer", { index: last[0], label: last[1] });
  state.past.pop();
  state.tasks[last[0]].label = last[1];
  go(last[0]);
});

at("accept").addEventListener("click", () => give(state.tasks[state.index].answer));
at("second").addEventListener("click", () => give(state.tasks[state.index].second));
at("outside").addEventListener("click", () => give(outsideName()));
at("skip").addEventListener("click", () => give(state.skip));
at("undo").addEventListener("click", undo);
at("filter").addEventListener("input", showClasses);
at("photo").addEventListener("error", () => {
  at("photo").hidden = true;
  at("missing").hidden = false;
  at("missing").textContent = "This photo cannot be shown.";
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !state.tasks.length) return;
  const task = () => state.tasks[state.index];
  if (event.target === at("filter")) {
    if (event.key === "Enter") {
      const fitting = showClasses();
      if (at("filter").value.trim() && fitting.length) { at("filter").blur(); give(fitting[0]); }
    } else if (event.key === "Escape") {
      at("filter").value = "";
      at("filter").blur();
      showClasses();
    } else return;
    event.preventDefault();
    return;
  }
  if (event.target instanceof HTMLButtonElement && (event.key === "Enter" || event.key === " ")) return;
  const keys = {
    Enter: () => give(task().answer), a: () => give(task().answer), 2: () => give(task().second),
    o: () => give(outsideName()), s: () => give(state.skip), u: undo, Backspace: undo,
    ArrowRight: () => inTurn(() => go(state.index + 1)), ArrowLeft: () => inTurn(() => go(state.index - 1)),
    "/": () => at("filter").focus(),
  };
  const act = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (act) { event.preventDefault(); act(); }
});

ask("tasks").then((found) => {
  Object.assign(state, found);
  const first = state.tasks.findIndex(({ label }) => label === null);
  go(first < 0 ? 0 : first);
}).catch((error) => { at("error").textContent = error.message; });
