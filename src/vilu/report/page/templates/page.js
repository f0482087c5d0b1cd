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

  // An axis is [low value, high value, start coordinate, end coordinate].
  const toCoordinate = (axis, value) => axis[2] + (axis[3] - axis[2]) * (value - axis[0]) / (axis[1] - axis[0]);
  const toValue = (axis, coordinate) => axis[0] + (axis[1] - axis[0]) * (coordinate - axis[2]) / (axis[3] - axis[2]);
  const setAttributes = (node, attributes) => { for (const key in attributes) node.setAttribute(key, attributes[key].toFixed(2)); };

  // Moves the marker of a chart to (x, y); y is null for a vertical line at x.
  function moveMarker(key, x, y) {
    const svg = document.querySelector(`svg[data-chart="${key}"]`);
    const group = svg && svg.querySelector(".marker");
    if (!group) return;
    const xAxis = numbers(svg.dataset.x), yAxis = numbers(svg.dataset.y);
    const px = toCoordinate(xAxis, Math.min(Math.max(x, xAxis[0]), xAxis[1]));
    const py = y === null ? 30 : toCoordinate(yAxis, Math.min(y, yAxis[1]));
    setAttributes(group.querySelector(".down"), { x1: px, x2: px, y1: py });
    if (y === null) return;
    setAttributes(group.querySelector(".left"), { x2: px, y1: py, y2: py });
    setAttributes(group.querySelector("circle"), { cx: px, cy: py });
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
    const position = index === null ? data.start : index;
    const hasNoThreshold = data.threshold[position] === null || (index === null && !data.exact);
    slider.value = position;
    field.value = hasNoThreshold ? "" : String(data.threshold[position]);
    slider.setAttribute("aria-valuetext", `threshold ${field.value || "none"}, ${percent(accepted, data.n)} accepted, ` +
      `${percent(wrong, accepted)} of them wrong`);
    reset.disabled = index === null;
    moveMarker("risk", accepted / data.n, accepted ? wrong / accepted : 0);
    moveMarker("roc", wrong / data.n_wrong, (accepted - wrong) / (data.n - data.n_wrong));
    moveMarker("histogram-0", data.threshold[position] === null ? -Infinity : data.threshold[position], null);
    let nChanged = 0;
    for (const card of cards) {
      const wasAccepted = card.dataset.accepted === "1";
      const isBelow = threshold !== null && Number(card.dataset.u) <= threshold;
      const isAccepted = index === null ? wasAccepted : isBelow;
      const hasChanged = isAccepted !== wasAccepted;
      card.classList.toggle("flipped", hasChanged);
      card.querySelector(".state").textContent = (hasChanged ? "now " : "") + (isAccepted ? "accepted" : "review");
      if (hasChanged) nChanged += 1;
    }
    byId("flips").textContent = `${nChanged} of ${cards.length}`;
  }

  slider.addEventListener("input", () => show(Number(slider.value)));
  field.addEventListener("change", () => {
    const wantedThreshold = field.value === "" ? -Infinity : Number(field.value);
    let index = 0;
    while (index + 1 < data.threshold.length && data.threshold[index + 1] <= wantedThreshold) index += 1;
    show(index);
  });
  reset.addEventListener("click", () => show(null));

  const legendButtons = [...document.querySelectorAll(".legend button")];
  // Emphasises the lines of one look; null: no line is emphasised.
  function emphasise(look) {
    for (const line of document.querySelectorAll(".line")) {
      if (Number(line.dataset.look) < 0) continue;
      line.classList.toggle("dim", look !== null && line.dataset.look !== look);
      line.classList.toggle("strong", line.dataset.look === look);
    }
  }
  const isPressed = (button) => button.getAttribute("aria-pressed") === "true";
  function pressedLook() {
    const pressedButton = legendButtons.find(isPressed);
    return pressedButton ? pressedButton.dataset.look : null;
  }
  for (const button of legendButtons) {
    button.addEventListener("click", () => {
      const press = !isPressed(button);
      legendButtons.forEach((other) => other.setAttribute("aria-pressed", String(press && other === button)));
      emphasise(pressedLook());
    });
    button.addEventListener("pointerenter", () => emphasise(button.dataset.look));
    button.addEventListener("pointerleave", () => emphasise(pressedLook()));
  }

  // The values that are shown are computed from the SVG points of the line nearest to the pointer.
  for (const svg of document.querySelectorAll("svg[data-chart]")) {
    const xAxis = numbers(svg.dataset.x), yAxis = numbers(svg.dataset.y);
    const lines = [...svg.querySelectorAll(".line")].map((node) => ({
      node, points: node.getAttribute("points").split(" ").map((pair) => pair.split(",").map(Number)),
    }));
    const readout = svg.parentNode.querySelector(".readout"), probe = svg.querySelector(".probe");
    const formatX = (x) => (svg.dataset.xUnit ? (100 * x).toFixed(1) + " %" : x.toPrecision(3));
    svg.addEventListener("pointermove", (event) => {
      const pointer = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      let nearest = null;
      for (const { node, points } of lines) {
        const point = points.reduce((a, b) => (Math.abs(b[0] - pointer.x) < Math.abs(a[0] - pointer.x) ? b : a));
        const distance = Math.abs(point[1] - pointer.y);
        if (!nearest || distance < nearest.distance) nearest = { distance, point, node };
      }
      if (!nearest) return;
      const [px, py] = nearest.point;
      probe.removeAttribute("hidden");
      setAttributes(probe, { cx: px, cy: py });
      probe.setAttribute("fill", nearest.node.getAttribute("stroke"));
      readout.textContent = `${nearest.node.dataset.name}: ${svg.dataset.xName} ${formatX(toValue(xAxis, px))}, ` +
        `${svg.dataset.yName} ${(100 * toValue(yAxis, py)).toFixed(1)} %`;
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
