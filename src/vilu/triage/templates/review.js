"use strict";
const key = new URLSearchParams(location.search).get("key") || "";
const at = (id) => document.getElementById(id);
const MOST_DIGITS = 9;
const state = { tasks: [], names: [], skip: "", index: 0, past: [], digits: [] };

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

const keyCap = (text) => {
  const cap = document.createElement("kbd");
  cap.textContent = text;
  return cap;
};

// A class keeps its digit for the whole session. Few classes have one each from the start. Of many
// classes, those that were used before have one, and a free digit goes to the next class in use.
const assignDigit = (name) => {
  const isClass = state.names.slice(0, -1).includes(name);
  if (isClass && !state.digits.includes(name) && state.digits.length < MOST_DIGITS) state.digits.push(name);
};

const assignFirstDigits = () => {
  const classes = state.names.slice(0, -1);
  (classes.length <= MOST_DIGITS ? classes : state.used).forEach(assignDigit);
};

const showClasses = () => {
  const typed = at("filter").value.trim().toLowerCase();
  const task = state.tasks[state.index];
  const others = state.names.filter((name) => !state.digits.includes(name));
  const ordered = task && task.blind ? [...state.digits, ...others] : state.names;
  const fitting = ordered.filter((name) => name.toLowerCase().includes(typed));
  if (typed) fitting.sort((a, b) => b.toLowerCase().startsWith(typed) - a.toLowerCase().startsWith(typed));
  at("classes").replaceChildren(...fitting.slice(0, 200).map((name, i) => {
    const item = document.createElement("li");
    item.role = "option";
    const digit = state.digits.indexOf(name) + 1;
    if (task && task.blind && digit) item.append(keyCap(digit), " ");
    item.append(name);
    item.setAttribute("aria-selected", String(task && task.label === name));
    if (typed && i === 0) item.className = "first";
    item.addEventListener("click", () => give(name));
    return item;
  }));
  return fitting;
};

const said = (task) => {
  if (task.blind) return "Which class is it?";
  if (task.answer === null) return "The model gives no answer.";
  if (task.zero_shot === null) return `The model says: ${task.answer}`;
  return `The model says: ${state.kind}: ${task.answer}; zero-shot: ${task.zero_shot}`;
};

const small = (text) => {
  const element = document.createElement("small");
  element.textContent = text;
  return element;
};

const showProgress = () => {
  const answered = state.tasks.filter(({ label }) => label !== null).length;
  at("progress").textContent = `${answered} of ${state.tasks.length} answered; photo ${state.index + 1}`;
  at("bar").value = answered / state.tasks.length;
  const isDone = answered === state.tasks.length && unsaved.length === 0;
  at("done").hidden = !isDone;
  at("afterwards").hidden = isDone;
};

const showPhoto = (task) => {
  at("photo").hidden = false;
  at("missing").hidden = true;
  at("photo").src = `photo/${state.index}?key=${encodeURIComponent(key)}`;
  at("photo").alt = task.answer === null ? "Photo" : `Photo, which the model calls ${task.answer}`;
  at("path").textContent = task.path;
  const next = state.tasks[state.index + 1];
  if (next) new Image().src = `photo/${state.index + 1}?key=${encodeURIComponent(key)}`;
};

const show = () => {
  const task = state.tasks[state.index];
  showProgress();
  showPhoto(task);
  at("said").replaceChildren(said(task));
  if (task.blind) at("said").append(small("This label may count for a guarantee. So the model's answer is not shown."));
  if (task.p !== null) at("said").append(small(percent(task.p)));
  else if (task.quantile !== null) at("said").append(small(`At least as doubtful as ${(100 * task.quantile).toFixed(0)} % of the photos`));
  document.body.classList.toggle("blind", task.blind);
  at("accept").hidden = task.blind;
  at("accept").disabled = task.answer === null;
  at("accept-text").textContent = task.answer === null ? "No answer" : `Right: ${task.answer}`;
  at("second").hidden = task.second === null;
  at("second-text").textContent = task.second || "";
  at("undo").disabled = state.past.length === 0;
  for (const [id, label] of [["accept", task.answer], ["second", task.second], ["outside", outsideName()], ["skip", state.skip]])
    at(id).setAttribute("aria-pressed", String(label !== null && task.label === label));
  at("filter-text").textContent = task.blind ? "By its digit, by a click, or by letters" : "Another class";
  at("filter").value = "";
  showClasses();
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

// Changes that are not saved yet, oldest first. The next photo is shown at once. So a key always means the photo that is seen.
const unsaved = [];
let isSaving = false;

const saveAll = async () => {
  if (isSaving) return;
  isSaving = true;
  try {
    while (unsaved.length) {
      await ask("answer", { index: unsaved[0].index, label: unsaved[0].label });
      unsaved.shift();
      at("error").textContent = "";
    }
    showProgress();
  } catch (error) {
    takeBack(error);
  } finally {
    isSaving = false;
  }
};

// After an error no later change is saved either, so the page shows only what is on the disk.
const takeBack = (error) => {
  const lost = unsaved.splice(0);
  for (const change of [...lost].reverse()) state.tasks[change.index].label = change.before;
  state.past = state.past.filter((change) => !lost.includes(change));
  go(lost[0].index);
  at("error").textContent = `Not saved: ${error.message}`;
};

const setLabel = (index, label) => {
  const change = { index, label, before: state.tasks[index].label };
  state.tasks[index].label = label;
  unsaved.push(change);
  return change;
};

const give = (label) => {
  if (label === null || label === undefined) return;
  state.past.push(setLabel(state.index, label));
  assignDigit(label);
  forward();
  saveAll();
};

const undo = () => {
  const last = state.past.pop();
  if (last === undefined) return;
  setLabel(last.index, last.before);
  go(last.index);
  saveAll();
};

const giveDigit = (digit) => {
  const task = state.tasks[state.index];
  if (task.blind) give(state.digits[digit - 1]);
  else if (digit === 2) give(task.second);
};

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
    Enter: () => give(task().answer), a: () => give(task().answer),
    o: () => give(outsideName()), s: () => give(state.skip), u: undo, Backspace: undo,
    ArrowRight: () => go(state.index + 1), ArrowLeft: () => go(state.index - 1),
    "/": () => at("filter").focus(),
  };
  if (/^[1-9]$/.test(event.key)) { event.preventDefault(); giveDigit(Number(event.key)); return; }
  const act = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (act) { event.preventDefault(); act(); }
});

addEventListener("beforeunload", (event) => { if (unsaved.length) event.preventDefault(); });

ask("tasks").then((found) => {
  Object.assign(state, found);
  assignFirstDigits();
  at("next").textContent = state.next;
  at("afterwards").textContent = `When you are done: stop the command with Ctrl-C; next: ${state.next}`;
  const first = state.tasks.findIndex(({ label }) => label === null);
  go(first < 0 ? 0 : first);
}).catch((error) => { at("error").textContent = error.message; });
