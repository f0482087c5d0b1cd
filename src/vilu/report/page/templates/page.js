"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const form = byId("control"), slider = byId("slider"), field = byId("threshold"), reset = byId("reset");
  const chosen = { accepted: Number(form.dataset.accepted), wrong: Number(form.dataset.wrong) };
  const cards = [...document.querySelectorAll(".card")];
  const numbers = (text) => text.split(" ").map(Number);
  const percent = (part, whole) => (whole ? (100 * part / whole).toFixed(1) + " %" : "–");
  const count = (value) => value.toLocaleString("en");

  document.documentElement.classList.add("scripted");
  form.hidden = false;
  form.addEventListener("submit", (event) => event.preventDefault());

  // An axis is [low value, high value, start coordinate, end coordinate]. place() converts a value
  // to a coordinate, value() converts a coordinate to a value.
  const place = (axis, value) => axis[2] + (axis[3] - axis[2]) * (value - axis[0]) / (axis[1] - axis[0]);
  const value = (axis, at) => axis[0] + (axis[1] - axis[0]) * (at - axis[2]) / (axis[3] - axis[2]);
  const set = (node, attributes) => { for (const key in attributes) node.setAttribute(key, attributes[key].toFixed(2)); };

  function mark(key, x, y) {
    const svg = document.querySelector(`svg[data-chart="${key}"]`);
    const group = svg && svg.querySelector(".marker");
    if (!group) return;
    const across = numbers(svg.dataset.x), up = numbers(svg.dataset.y);
    const px = place(across, Math.min(Math.max(x, across[0]), across[1]));
    const py = y === null ? 30 : place(up, Math.min(y, up[1]));
    set(group.querySelector(".down"), { x1: px, x2: px, y1: py });
    if (y === null) return;
    set(group.querySelector(".left"), { x2: px, y1: py, y2: py });
    set(group.querySelector("circle"), { cx: px, cy: py });
  }

  // index: index of an operating point; null for the chosen rows, which need not have one threshold.
  function show(index) {
    const threshold = index === null ? null : data.threshold[index];
    const accepted = index === null ? chosen.accepted : data.accepted[index];
    const wrong = index === null ? chosen.wrong : data.wrong[index];
    byId("coverage").textContent = percent(accepted, data.n);
    byId("accepted").textContent = `${count(accepted)} of ${count(data.n)}`;
    byId("risk").textContent = percent(wrong, accepted);
    byId("wrong").textContent = `${count(wrong)} wrong`;
    byId("review").textContent = count(data.n - accepted);
    const at = index === null ? data.start : index;
    slider.value = at;
    field.value = data.threshold[at] === null || (index === null && !data.exact) ? "" : String(data.threshold[at]);
    slider.setAttribute("aria-valuetext", `threshold ${field.value || "none"}, ${percent(accepted, data.n)} accepted, ` +
      `${percent(wrong, accepted)} of them wrong`);
    reset.disabled = index === null;
    mark("risk", accepted / data.n, accepted ? wrong / accepted : 0);
    mark("roc", wrong / data.n_wrong, (accepted - wrong) / (data.n - data.n_wrong));
    mark("histogram-0", data.threshold[at] === null ? -Infinity : data.threshold[at], null);
    let flips = 0;
    for (const card of cards) {
      const before = card.dataset.accepted === "1";
      const now = index === null ? before : threshold !== null && Number(card.dataset.u) <= threshold;
      card.classList.toggle("flipped", now !== before);
      card.querySelector(".state").textContent = (now === before ? "" : "now ") + (now ? "accepted" : "review");
      flips += now !== before;
    }
    byId("flips").textContent = `${flips} of ${cards.length}`;
  }

  slider.addEventListener("input", () => show(Number(slider.value)));
  field.addEventListener("change", () => {
    const wanted = field.value === "" ? -Infinity : Number(field.value);
    let index = 0;
    while (index + 1 < data.threshold.length && data.threshold[index + 1] <= wanted) index += 1;
    show(index);
  });
  reset.addEventListener("click", () => show(null));

  const legend = [...document.querySelectorAll(".legend button")];
  function emphasise(look) {
    for (const line of document.querySelectorAll(".line")) {
      if (Number(line.dataset.look) < 0) continue;
      line.classList.toggle("dim", look !== null && line.dataset.look !== look);
      line.classList.toggle("strong", line.dataset.look === look);
    }
  }
  const pressed = () => { const on = legend.find((b) => b.getAttribute("aria-pressed") === "true"); return on ? on.dataset.look : null; };
  for (const button of legend) {
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      legend.forEach((other) => other.setAttribute("aria-pressed", String(on && other === button)));
      emphasise(pressed());
    });
    button.addEventListener("pointerenter", () => emphasise(button.dataset.look));
    button.addEventListener("pointerleave", () => emphasise(pressed()));
  }

  // The values that are shown are computed from the SVG points of the line nearest to the pointer.
  for (const svg of document.querySelectorAll("svg[data-chart]")) {
    const across = numbers(svg.dataset.x), up = numbers(svg.dataset.y);
    const lines = [...svg.querySelectorAll(".line")].map((node) => ({
      node, points: node.getAttribute("points").split(" ").map((pair) => pair.split(",").map(Number)),
    }));
    const readout = svg.parentNode.querySelector(".readout"), probe = svg.querySelector(".probe");
    const written = (x) => (svg.dataset.xUnit ? (100 * x).toFixed(1) + " %" : x.toPrecision(3));
    svg.addEventListener("pointermove", (event) => {
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      let best = null;
      for (const line of lines) {
        const near = line.points.reduce((a, b) => (Math.abs(b[0] - at.x) < Math.abs(a[0] - at.x) ? b : a));
        const away = Math.abs(near[1] - at.y);
        if (!best || away < best.away) best = { away, near, name: line.node.dataset.name, node: line.node };
      }
      if (!best) return;
      probe.removeAttribute("hidden");
      set(probe, { cx: best.near[0], cy: best.near[1] });
      probe.setAttribute("fill", best.node.getAttribute("stroke"));
      readout.textContent = `${best.name}: ${svg.dataset.xName} ${written(value(across, best.near[0]))}, ` +
        `${svg.dataset.yName} ${(100 * value(up, best.near[1])).toFixed(1)} %`;
    });
    svg.addEventListener("pointerleave", () => probe.setAttribute("hidden", "hidden"));
  }

  for (const table of document.querySelectorAll(".sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    const key = (row, column) => {
      const cell = row.cells[column];
      return cell.dataset.v === undefined ? cell.textContent.trim() : cell.dataset.v === "" ? NaN : Number(cell.dataset.v);
    };
    heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const compare = (a, b) => {
        const x = key(a, column), y = key(b, column);
        if (typeof x === "string") return sign * (x < y ? -1 : x > y ? 1 : 0);
        return Number.isNaN(x) - Number.isNaN(y) || sign * (x - y) || 0;
      };
      table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
    }));
  }
  show(null);
})();
