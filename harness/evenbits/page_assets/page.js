
"use strict";
// Brings the page to life: everything it shows stands in the HTML or in the data beside it. Text of records goes in as
// text (textContent, setAttribute) and never as markup.
(() => {
  const find = (selector, root = document) => root.querySelector(selector);
  const every = (selector, root = document) => [...root.querySelectorAll(selector)];
  const data = JSON.parse(find("#data").textContent);
  const rows = new Map(data.models.flatMap((model) => model.rows.map((row) => [row.id, { row, model }])));
  const form = find("#filters"), tip = find("#tip"), dialog = find("#trial");
  const BEYOND = 20, WIDE = 4; // as in the report's pictures

  const make = (space) => (name, attributes = {}, ...children) => {
    const node = space ? document.createElementNS(space, name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (value === true) node.setAttribute(key, "");
      else if (value !== false && value !== null && value !== undefined) node.setAttribute(key, value);
    }
    node.append(...children.filter((child) => child !== null && child !== undefined));
    return node;
  };
  const el = make(""), svg = make("http://www.w3.org/2000/svg");

  const ways = new Map(); // toFixed rounds 2.0625 up, the report to even
  const fixed = (value, digits) => {
    if (!ways.has(digits)) ways.set(digits, new Intl.NumberFormat("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits, useGrouping: false, roundingMode: "halfEven" }));
    return ways.get(digits).format(value);
  };
  const number = (value) => { // as report_format.py writes it
    if (value === null || value === undefined) return "–";
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size < 1e-3 || size >= 1e6) return value.toExponential(3).replace(/e([+-])(\d)$/, "e$10$2");
    return fixed(value, Math.max(0, 3 - Math.floor(Math.log10(size))));
  };
  const full = (row) => (row.settings ? `${row.method} (${row.settings})` : row.method);

  // -- state, and the fragment that holds it ---------------------------------------------------------------------

  const KEYS = ["model", "budget", "stage", "text", "metric", "x", "cols", "sort", "dir", "trial"];
  const metrics = [...new Set(data.models.flatMap((model) => model.columns.filter((c) => c.quality).map((c) => c.title)))];
  const columns = [...new Set(data.models.flatMap((model) => model.columns.map((c) => c.title)))];
  const START = { model: "", budget: "", stage: "", text: "", metric: metrics[0] || "", x: data.models.every((model) => model.over === "model") ? "model" : "linear", cols: metrics.slice(0, 2).join("\n"), sort: "", dir: "", trial: "" };
  let state = { ...START };

  const readFragment = () => {
    const raw = location.hash.slice(1);
    const next = { ...START };
    if (!raw) return next;
    if (raw.startsWith("t-") && rows.has(raw.slice(2))) return { ...state, trial: raw.slice(2) };
    if (!raw.includes("=")) return null;
    for (const [key, value] of new URLSearchParams(raw)) if (KEYS.includes(key)) next[key] = value;
    for (const name of ["model", "budget", "stage", "metric", "x"]) {
      const field = form.elements[name];
      if (field && ![...field.options].some((option) => option.value === next[name])) next[name] = START[name];
    }
    if (!rows.has(next.trial)) next.trial = "";
    if (!["ascending", "descending"].includes(next.dir)) next.sort = next.dir = "";
    return next;
  };
  const writeFragment = (anew = false) => { // anew: as a step of its own, which the browser's Back takes away again
    const said = new URLSearchParams();
    for (const key of KEYS) if (state[key] !== START[key]) said.set(key, state[key]);
    const text = said.toString().replaceAll("+", "%20");
    try {
      const address = text ? `#${text}` : location.pathname + location.search;
      if (anew) history.pushState({ step: true }, "", address);
      else history.replaceState(history.state, "", address);
    } catch { /* a page in a sandbox keeps its address */ }
  };

  // -- which rows are in view --------------------------------------------------------------------------------------

  const words = () => state.text.toLowerCase().split(/\s+/).filter(Boolean);
  const visible = (line) => {
    if (line.group === "dense" && line.stage === "none") return true; // what all others are held against
    if (state.budget && line.budget !== state.budget) return line.group === "dense" && (!state.stage || line.stage === state.stage);
    if (state.stage && line.stage !== state.stage) return false;
    return words().every((word) => line.text.includes(word));
  };
  const lines = every(".board tr[data-entry]").map((node, index) => ({
    node, index, id: node.dataset.entry, budget: node.dataset.budget, stage: node.dataset.stage, group: node.dataset.group, text: node.dataset.text,
  }));
  const byId = new Map(lines.map((line) => [line.id, line]));
  const inView = (row) => visible(byId.get(row.id));

  const apply = () => {
    let shown = 0, total = 0;
    for (const section of every("section.model")) section.hidden = state.model !== "" && section.dataset.model !== state.model;
    for (const line of lines) {
      const seen = visible(line);
      line.node.hidden = !seen;
      if (line.node.closest("section.model").hidden) continue;
      total += 1;
      shown += seen;
    }
    for (const body of every(".board tbody")) body.hidden = !every("tr[data-entry]", body).some((node) => !node.hidden);
    find(".count", form).textContent = shown === total ? `${total} row${total === 1 ? "" : "s"}` : `${shown} of ${total} rows`;
    showColumns();
    sortBoards();
    draw();
  };

  // A metric of the same name under another protocol stands in for one that this model does not have.
  const columnOf = (model, title) => {
    const name = title.replace(/ \[[^\]]*\]$/, "");
    return model.columns.find((c) => c.title === title) || model.columns.find((c) => c.name === name);
  };

  const showColumns = () => {
    const asked = new Set([...state.cols.split("\n"), state.metric]);
    for (const board of every(".board")) {
      const model = data.models.find((one) => one.key === board.dataset.model);
      const wanted = new Set([...asked].map((title) => columnOf(model, title)).filter(Boolean).map((c) => c.title));
      for (const cell of every("[data-metric]", board)) cell.hidden = !wanted.has(cell.dataset.metric);
      const width = every("thead th", board).filter((cell) => !cell.hidden).length;
      for (const cell of every(".group th", board)) cell.colSpan = width;
    }
    for (const box of every(".choose input")) {
      box.checked = asked.has(box.value);
      box.disabled = box.value === state.metric;
    }
  };

  // -- sorting, within each group ----------------------------------------------------------------------------------

  const sortBoards = () => {
    for (const board of every(".board")) {
      const heads = every("thead th", board);
      const at = heads.findIndex((head) => head.dataset.col === state.sort);
      heads.forEach((head, index) => head.setAttribute("aria-sort", index === at ? state.dir : "none"));
      const sign = state.dir === "descending" ? -1 : 1;
      for (const body of board.tBodies) {
        const own = every("tr[data-entry]", body).map((node) => byId.get(node.dataset.entry));
        const key = (line) => line.node.cells[at].dataset.v;
        const numeric = at >= 0 && heads[at].classList.contains("num");
        own.sort((a, b) => {
          if (at < 0) return a.index - b.index;
          const [x, y] = [key(a), key(b)];
          if (x === undefined || y === undefined) return (x === undefined) - (y === undefined) || a.index - b.index;
          return sign * (numeric ? Number(x) - Number(y) || 0 : x.localeCompare(y, "en")) || a.index - b.index;
        });
        body.append(...own.map((line) => line.node));
      }
    }
  };
  for (const head of every(".board thead th")) {
    const button = el("button", { type: "button" });
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const now = state.sort === head.dataset.col ? state.dir : "";
      const next = { "": "ascending", ascending: "descending", descending: "" }[now];
      update({ sort: next && head.dataset.col, dir: next });
    });
  }

  // -- the plot ----------------------------------------------------------------------------------------------------

  const scale = (low, high, near, far, log) => {
    const f = log ? Math.log : (v) => v;
    return Object.assign((v) => near + ((f(v) - f(low)) / (f(high) - f(low))) * (far - near), { low, high, log });
  };
  const ticks = (axis, count) => {
    const { low, high, log } = axis, found = [];
    if (log) {
      const steps = Math.log10(high / low) < 2.2 ? [1, 2, 5] : [1];
      for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1)
        for (const step of steps) found.push(Number((step * 10 ** power).toPrecision(6)));
      return found.filter((v) => v >= low && v <= high);
    }
    const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map((s) => s * power).find((s) => s >= rough * 0.999);
    for (let i = Math.ceil(low / step - 1e-9); i <= Math.floor(high / step + 1e-9); i += 1) found.push(Number((i * step).toPrecision(10)));
    return found;
  };
  // Windows are narrow and lie far apart: where most of the axis would be empty, what lies between is cut out.
  const CUT = 26;
  const brokenScale = (spans, windows, near, far) => {
    const sorted = [...spans].sort((a, b) => a[0] - b[0]), joined = [];
    const wide = Math.max(...sorted.map(([a, b]) => b - a), 0.02);
    for (const [a, b] of sorted) {
      const last = joined.at(-1);
      if (last && a - last[1] < 2 * wide) last[1] = Math.max(last[1], b);
      else joined.push([a, b]);
    }
    const used = joined.reduce((sum, [a, b]) => sum + b - a, 0), whole = joined.at(-1)[1] - joined[0][0];
    const total = windows && joined.length > 1 && used + 0.3 * wide * joined.length < 0.5 * whole ? joined : [[joined[0][0], joined.at(-1)[1]]];
    const pad = total.length > 1 ? 0.12 * wide : 0.06 * Math.max(whole, 0.5);
    const padded = total.map(([a, b]) => [a - pad, b + pad]);
    const room = far - near - CUT * (padded.length - 1), share = padded.map(([a, b]) => Math.max(b - a, 0.6 * (wide + 2 * pad)));
    const all = share.reduce((a, b) => a + b, 0);
    let at = near;
    const parts = padded.map(([low, high], i) => {
      const part = { low, high, near: at, far: at + (room * share[i]) / all };
      at = part.far + CUT;
      return part;
    });
    const to = (v) => {
      const part = parts.find((one) => v <= one.high) || parts.at(-1);
      return part.near + ((v - part.low) / (part.high - part.low)) * (part.far - part.near);
    };
    return Object.assign(to, { parts });
  };
  const frontOf = (points, lower) => {
    const sign = lower ? 1 : -1;
    let best = Infinity;
    return [...points].sort((a, b) => a.bits - b.bits || sign * (a.value - b.value)).filter((p) => sign * p.value < best && ((best = sign * p.value), true));
  };
  const splitFar = (values) => { // what few points lie far below all others, as the report's pictures of recovery have it
    const found = [...values].sort((a, b) => a - b);
    let gap = 0, at = 0;
    for (let i = 1; i < found.length; i += 1) if (found[i] - found[i - 1] >= gap) [gap, at] = [found[i] - found[i - 1], i];
    const span = Math.max(1, found.at(-1)) - found[0];
    return gap > Math.max(0.1, 0.5 * span) && 4 * at <= found.length ? found[at] - 1e-9 : -Infinity;
  };
  const pressed = new Map(); // model key -> methods picked in its legend
  let lastPoint = "";

  const pointsOf = (model, metric) => {
    const across = state.x === "model" ? 1 : 0;
    return model.rows
      .filter((row) => row.look && row.cells[metric] && row.cells[metric][0] !== null && inView(row))
      .map((row) => {
        const [value, low, high] = row.cells[metric];
        return { row, bits: row.bits[across], value, low, high };
      })
      .sort((a, b) => a.bits - b.bits || a.value - b.value);
  };

  // In words, a number is what the leaderboard has: rounded again here, its last digit might be another.
  const told = (row, metric) => {
    const [cell, ratio] = every("td[data-metric]", byId.get(row.id).node).filter((one) => one.dataset.metric === metric);
    const part = (within, kind) => (within && find(kind, within) ? find(kind, within).textContent : "");
    const both = (within) => [part(within, ".v"), part(within, ".ci")].filter(Boolean).join(" ");
    const standing = part(cell, ".mark .vh").slice(2, -1) || (row.group === "outside" ? "outside its window, not ranked" : "");
    return { bits: row.said, value: part(cell, ".v"), interval: part(cell, ".ci"), both: both(cell), ratio: both(ratio), standing };
  };

  const draw = () => {
    for (const figure of every("figure.pareto")) {
      if (figure.closest("section.model").hidden) continue;
      const model = data.models.find((one) => one.key === figure.dataset.model);
      drawPlot(figure, model);
    }
  };

  const drawPlot = (figure, model) => {
    const column = columnOf(model, state.metric), metric = column ? column.title : "";
    const old = figure.firstElementChild;
    const points = column ? pointsOf(model, metric) : [];
    if (!points.length) {
      const why = column ? `No compressed model in view has a finite ${metric}.` : `${model.name} has no ${state.metric}.`;
      old.replaceWith(el("p", { class: "nothing" }, why));
      fillNumbers(figure, model, column, points);
      return;
    }
    const width = Math.max(280, Math.round(figure.clientWidth) || 760), narrow = width < 520;
    const height = Math.round(Math.min(430, Math.max(290, width * 0.5)));
    const left = narrow ? 50 : 64, right = 16, top = 28, bottom = 46;
    const dense = model.rows.find((row) => row.group === "dense" && row.stage === "none" && row.cells[metric] && row.cells[metric][0] !== null);
    const base = dense ? dense.cells[metric][0] : null;
    const best = Math.min(...points.map((p) => p.value)), held = base === null ? best : base;
    const limit = column.lower && held > 0 && best <= BEYOND * held ? BEYOND * held : Infinity;
    const floor = !column.lower && base > 0 ? splitFar(points.map((p) => p.value / base)) * base : -Infinity;
    const inside = points.filter((p) => p.value <= limit && p.value >= floor);
    const onModel = state.x === "model";
    const windows = model.budgets.filter((b) => (b.on === "model") === onModel && (!state.budget || b.name === state.budget));
    const x = brokenScale([...points.map((p) => [p.bits, p.bits]), ...windows.map((b) => [b.low, b.high])], windows.length > 0, left, width - right);
    const main = [...inside.map((p) => p.value), ...(base === null ? [] : [base])];
    const log = Math.min(...main) > 0 && Math.max(...main) / Math.min(...main) >= WIDE;
    const ends = [...main, ...inside.flatMap((p) => [p.low, p.high]).filter((v) => v !== null && (v > 0 || !log))];
    let [low, high] = [Math.min(...ends), Math.max(...ends)];
    const room = log ? 1.08 : 0.05 * (high - low) || 0.05 * Math.abs(high) || 1;
    [low, high] = log ? [low / room, high * room] : [low - room, high + room];
    const y = scale(low, high, height - bottom, top, log);
    const picked = pressed.get(model.key) || new Set();
    const faded = (row) => (picked.size && !picked.has(row.method) ? " dim" : "");
    const label = `${metric} over ${state.x} bits, ${points.length} points. Arrow keys go from point to point, Enter opens one. The same numbers stand in the table below.`;
    const picture = svg("svg", { class: "plot", viewBox: `0 0 ${width} ${height}`, width, height, role: "group", "aria-label": label });
    const foot = height - bottom, at = (v) => v.toFixed(1);
    for (const b of windows) picture.append(svg("rect", { class: "window", x: at(x(b.low)), y: top, width: at(x(b.high) - x(b.low)), height: foot - top }));
    for (const v of ticks(y, 6)) {
      picture.append(svg("path", { class: "grid", d: `M${left} ${at(y(v))}H${width - right}` }), svg("text", { class: "tick end", x: left - 8, y: at(y(v) + 4) }, String(v)));
    }
    picture.append(svg("path", { class: "axis", d: `M${left} ${foot}H${width - right}` }));
    for (const part of x.parts) {
      for (const v of ticks(part, Math.max(1.4, (part.far - part.near) / (narrow ? 55 : 80)))) {
        picture.append(svg("path", { class: "axis", d: `M${at(x(v))} ${foot}v5` }), svg("text", { class: "tick mid", x: at(x(v)), y: foot + 19 }, String(v)));
      }
    }
    const unit = onModel ? "model bits per parameter" : "linear bits per weight";
    picture.append(svg("text", { class: "name mid", x: (left + width - right) / 2, y: height - 6 }, unit));
    picture.append(svg("text", { class: "name", x: 0, y: 14 }, `${metric}, ${column.lower ? "lower" : "higher"} is better${log ? ", log scale" : ""}`));
    const front = frontOf(inside, column.lower);
    if (front.length) picture.append(svg("path", { class: "front", d: front.map((p, i) => (i ? `H${at(x(p.bits))}V${at(y(p.value))}` : `M${at(x(p.bits))} ${at(y(p.value))}`)).join("") }));
    if (base !== null) picture.append(svg("path", { class: "dense", d: `M${left} ${at(y(base))}H${width - right}` }));
    find(".densename", figure.parentNode).textContent = base === null ? "dense model (not measured)" : `dense model ${told(dense, metric).value}`;
    for (const part of x.parts.slice(0, -1)) {
      const cut = (from) => `M${at(from - 4)} ${foot + 6}L${at(from + 4)} ${foot - 6}`;
      picture.append(svg("rect", { class: "break", x: at(part.far), y: top, width: CUT, height: foot - top + 1 }), svg("path", { class: "cut", d: cut(part.far) + cut(part.far + CUT) }));
    }
    for (const p of inside) {
      if (p.low === null || p.high === null) continue;
      const clip = (v) => at(y(Math.min(Math.max(v, low), high)));
      picture.append(svg("path", { class: `bar k${p.row.look[0]}${faded(p.row)}`, d: `M${at(x(p.bits))} ${clip(p.low)}V${clip(p.high)}`, "data-method": p.row.method }));
    }
    let current = points.find((p) => p.row.id === lastPoint) || points[0];
    const edge = []; // where markers at the edge stand: those close together go below each other
    for (const p of points) {
      const off = !inside.includes(p), px = x(p.bits), down = 15 * edge.filter((other) => Math.abs(other - px) < 70).length;
      const py = !off ? y(p.value) : p.value > limit ? top + down : foot - 8 - down;
      if (off) edge.push(px);
      const spot = svg("g", {
        class: `spot${faded(p.row)}`, transform: `translate(${at(px)} ${at(py)})`, role: "button", tabindex: p === current ? 0 : -1,
        "data-entry": p.row.id, "data-method": p.row.method, "aria-haspopup": "dialog", "aria-label": spoken(p, column),
      });
      spot.append(
        svg("circle", { class: "halo", r: 11 }),
        svg("path", { class: `point k${p.row.look[0]}${p.row.group === "outside" ? " hollow" : ""}`, d: data.shapes[p.row.look[1]] }),
      );
      if (off) spot.append(svg("text", px > width - 90 ? { class: "off end", x: -10, y: 4 } : { class: "off", x: 10, y: 4 }, `${told(p.row, metric).value} ${p.value > limit ? "↑" : "↓"}`));
      spot.addEventListener("pointerenter", () => showTip(spot, p, column));
      spot.addEventListener("pointerleave", hideTip);
      spot.addEventListener("focus", () => { lastPoint = p.row.id; showTip(spot, p, column); });
      spot.addEventListener("blur", hideTip);
      spot.addEventListener("click", () => openTrial(p.row.id));
      picture.append(spot);
    }
    picture.addEventListener("keydown", (event) => {
      const spots = every(".spot", picture), now = spots.indexOf(event.target.closest(".spot"));
      if (now < 0) return;
      const next = { ArrowRight: now + 1, ArrowUp: now + 1, ArrowLeft: now - 1, ArrowDown: now - 1, Home: 0, End: spots.length - 1 }[event.key];
      if (next !== undefined) {
        event.preventDefault();
        const target = spots[Math.min(Math.max(next, 0), spots.length - 1)];
        for (const spot of spots) spot.setAttribute("tabindex", spot === target ? 0 : -1);
        target.focus();
      } else if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        openTrial(spots[now].dataset.entry);
      }
    });
    old.replaceWith(picture);
    fillNumbers(figure, model, column, points);
  };

  const budgetOf = (row) => ({ dense: "uncompressed", free: "no budget" })[row.budget] || row.budget;
  const spoken = ({ row }, column) => {
    const { bits, both, ratio, standing } = told(row, column.title);
    return [full(row), `budget ${budgetOf(row)}`, `${bits[0]} linear bits, ${bits[1]} model bits`, `${column.title} ${both}`,
      ratio ? `${ratio} of dense` : "", standing].filter(Boolean).join("; ");
  };

  const fillNumbers = (figure, model, column, points) => {
    const box = find(".numbers", figure.parentNode);
    for (const item of every(".legend [data-method]", figure.parentNode)) {
      item.hidden = !model.rows.some((row) => row.method === item.dataset.method && inView(row));
    }
    if (!box) return;
    const fill = () => {
      if (!box.open) return;
      const head = ["method", "budget", "linear bits", "model bits", column ? column.title : "", "95 % interval", "vs dense", "standing"];
      const body = points.map(({ row }) => {
        const { bits, value, interval, ratio, standing } = told(row, column.title);
        return [full(row), budgetOf(row), ...bits, value, interval, ratio, standing];
      });
      find(".scroll", box).replaceChildren(tableOf(`${model.name}: points of the plot from left to right`, head, body, [2, 3, 4]));
    };
    box.ontoggle = fill;
    fill();
  };
  const tableOf = (caption, head, body, numeric = []) => {
    const kind = (i) => (numeric.includes(i) ? { class: "num" } : {});
    return el("table", {},
      el("caption", {}, el("span", {}, caption)),
      el("thead", {}, el("tr", {}, ...head.map((text, i) => el("th", { scope: "col", ...kind(i) }, text)))),
      el("tbody", {}, ...body.map((line) => el("tr", {}, ...line.map((text, i) => (i ? el("td", kind(i), text) : el("th", { scope: "row" }, text)))))));
  };

  for (const section of every("section.model")) {
    const key = section.dataset.model, picked = new Set();
    pressed.set(key, picked);
    for (const item of every(".legend [data-method]", section)) {
      const button = el("button", { type: "button", "aria-pressed": "false" });
      button.append(...item.childNodes);
      item.append(button);
      const light = (methods) => {
        for (const mark of every(".pareto [data-method]", section)) mark.classList.toggle("dim", methods.size > 0 && !methods.has(mark.dataset.method));
      };
      button.addEventListener("click", () => {
        const name = item.dataset.method;
        if (!picked.delete(name)) picked.add(name);
        button.setAttribute("aria-pressed", String(picked.has(name)));
        light(picked);
      });
      button.addEventListener("pointerenter", () => light(new Set([...picked, item.dataset.method])));
      button.addEventListener("pointerleave", () => light(picked));
    }
  }

  // -- the tooltip -------------------------------------------------------------------------------------------------

  let leaving = 0;
  const showTip = (spot, p, column) => {
    clearTimeout(leaving);
    const { bits, both, ratio, standing } = told(p.row, column.title);
    const facts = [["budget", budgetOf(p.row)], ["linear bits", bits[0]], ["model bits", bits[1]], [column.title, both]];
    if (ratio) facts.push(["vs dense", ratio]);
    if (p.row.seeds > 1) facts.push(["seeds", String(p.row.seeds)]);
    if (standing) facts.push(["standing", standing]);
    tip.replaceChildren(
      el("strong", {}, p.row.method),
      p.row.settings ? el("span", { class: "settings" }, p.row.settings) : "",
      el("dl", {}, ...facts.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])));
    tip.hidden = false;
    const at = find(".point", spot).getBoundingClientRect(), own = tip.getBoundingClientRect();
    const leftmost = Math.max(8, Math.min(at.left + at.width / 2 - own.width / 2, document.documentElement.clientWidth - own.width - 8));
    const above = at.top - own.height - 10;
    tip.style.left = `${leftmost}px`;
    tip.style.top = `${above > 4 ? above : at.bottom + 10}px`;
  };
  const hideTip = () => { clearTimeout(leaving); leaving = setTimeout(() => { tip.hidden = true; }, 120); };
  tip.addEventListener("pointerenter", () => clearTimeout(leaving));
  tip.addEventListener("pointerleave", hideTip);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });
  document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

  // -- a trial in its dialog ---------------------------------------------------------------------------------------

  let home = null, opener = null, goingBack = false;
  addEventListener("popstate", () => {
    if (goingBack && dialog.open) writeFragment(true); // the next one was opened before the step back was made
    goingBack = false;
  });
  const settle = () => {
    const article = find("article", dialog);
    if (article) home.replaceWith(article);
    return article !== null;
  };
  const openTrial = (id, from = document.activeElement, anew = true) => {
    if (dialog.open) return;
    settle(); // the event of closing comes later than a quick hand
    const article = document.getElementById(`t-${id}`);
    opener = from && from !== document.body ? { node: from, entry: from.dataset ? from.dataset.entry : undefined } : null;
    home = document.createComment(id);
    article.replaceWith(home);
    enrich(article, id);
    dialog.append(article);
    dialog.setAttribute("aria-labelledby", `t-${id}-name`);
    tip.hidden = true;
    dialog.showModal();
    dialog.scrollTop = 0;
    state.trial = id;
    if (!goingBack) writeFragment(anew && !(history.state && history.state.step));
  };
  const putBack = () => {
    if (dialog.open || !settle()) return; // another trial stands in it already
    state.trial = "";
    goingBack = Boolean(history.state && history.state.step);
    if (goingBack) history.back();
    else writeFragment();
    let node = opener && opener.node;
    if (node && !node.isConnected && opener.entry) node = find(`.spot[data-entry="${CSS.escape(opener.entry)}"]`);
    if (node && node.isConnected) node.focus();
    tip.hidden = true;
  };
  dialog.addEventListener("close", putBack);
  find(".close", dialog).addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a.open");
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    openTrial(link.getAttribute("href").slice(3), link);
  });

  const enrich = (article, id) => {
    if (article.dataset.done) return;
    article.dataset.done = "yes";
    for (const link of every("a.pull", article)) {
      const target = find(`[id="${CSS.escape(link.getAttribute("href").slice(1))}"]`);
      const body = target && find("div", target);
      if (body) link.replaceWith(el("details", { class: "pulled" }, el("summary", {}, link.textContent), body.cloneNode(true)));
    }
    const place = find(".written", article);
    if (place) writeSamples(place, id);
    const map = find(".map", article);
    if (map) drawLayers(map, rows.get(id));
  };

  const writeSamples = (place, id) => {
    const parts = [];
    for (const asked of every("#samples .asked")) {
      const own = find(`tr[data-entry="${CSS.escape(id)}"]`, asked), dense = find("tr[data-dense]", asked);
      if (!own) continue;
      const pair = el("div", { class: "beside" });
      for (const [name, line] of [["dense model", dense], [own.cells[0].textContent, own]]) {
        if (!line || (line === own && own === dense)) continue;
        const said = line.cells[2].cloneNode(true);
        pair.append(el("div", {}, el("span", {}, name), el("div", { class: "said" }, ...said.childNodes)));
      }
      parts.push(find(".prompt", asked).cloneNode(true), pair);
      if (own !== dense && own.cells[4].textContent) {
        const parting = own.cells[4].textContent === "nowhere" ? "the same words throughout" : `${own.cells[3].textContent} of the words in common; parts at ${own.cells[4].textContent}`;
        parts.push(el("p", { class: "quiet" }, `${parting}; ${own.cells[5].textContent} tokens, ended by ${own.cells[7].textContent}`));
      }
    }
    if (parts.length) place.replaceChildren(...parts);
  };

  // -- the layers' map ---------------------------------------------------------------------------------------------

  const STEPS = [0.06, 0.16, 0.28, 0.4, 0.52, 0.62, 0.88, 1]; // no step between, where neither ink nor ground is read on it
  const drawLayers = (place, { row, model }) => {
    const [bits, errors, calibrated, dense] = row.layers;
    const kinds = [{ name: "error", values: errors }, { name: "calibrated error", values: calibrated }].filter((one) => one.values.some((v) => v !== null));
    if (!kinds.length) return;
    const canvas = el("div"), bar = el("div", { class: "heatbar", role: "group", "aria-label": "which error" });
    const show = (chosen) => {
      for (const button of every("button", bar)) button.setAttribute("aria-pressed", String(button.textContent === chosen.name));
      canvas.replaceChildren(heat(chosen, bits, dense, model));
    };
    if (kinds.length > 1) bar.append(...kinds.map((one) => { const b = el("button", { type: "button" }, one.name); b.addEventListener("click", () => show(one)); return b; }));
    else bar.append(kinds[0].name);
    const body = model.places.map(([name], i) => [name, bits[i] === null ? "–" : fixed(bits[i], 3), dense.includes(i) ? "left dense" : number(errors[i]), dense.includes(i) ? "left dense" : number(calibrated[i])]);
    const table = el("details", {}, el("summary", {}, "Every layer as a table"));
    table.addEventListener("toggle", () => {
      if (table.open && !find("table", table)) table.append(el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Every layer" }, tableOf("Error and bits of every layer", ["layer", "bits", "error", "calibrated error"], body, [1, 2, 3])));
    });
    place.replaceChildren(bar, canvas, table);
    show(kinds[0]);
  };

  const heat = ({ name, values }, bits, dense, model) => {
    const blocks = [...new Set(model.places.map(([, block]) => block))].sort((a, b) => (a === null ? 1 : b === null ? -1 : a - b));
    const known = values.filter((v) => v !== null && v > 0), low = Math.min(...known), high = Math.max(...known);
    const few = blocks.length <= 14, cell = few ? 46 : Math.max(9, Math.min(30, 640 / blocks.length)), tall = few ? 24 : 18, left = 62;
    const width = left + cell * blocks.length + 2, height = tall * model.kinds.length + 22;
    const label = known.length ? `${name} of every layer by kind and block, from ${number(low)} to ${number(high)}; darker in the light theme, brighter in the dark one, is more` : name;
    const picture = svg("svg", { class: "heat", viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label });
    model.kinds.forEach((kind, i) => picture.append(svg("text", { class: "kind", x: left - 8, y: i * tall + tall / 2 + 4 }, kind)));
    const every_ = Math.ceil(blocks.length / (few ? 14 : 16));
    blocks.forEach((block, i) => { if (i % every_ === 0) picture.append(svg("text", { class: "block", x: left + (i + 0.5) * cell, y: height - 6 }, block === null ? "–" : String(block))); });
    model.places.forEach(([layer, block, kind], i) => {
      if (bits[i] === null) return;
      const x = left + blocks.indexOf(block) * cell, y = kind * tall, value = values[i];
      const level = value === null ? -1 : value <= 0 || high <= low ? 0 : Math.min(STEPS.length - 1, Math.floor((Math.log(value / low) / Math.log(high / low)) * STEPS.length));
      const box = svg("rect", { x: x + 0.5, y: y + 0.5, width: cell - 1, height: tall - 1, class: level < 0 ? "left" : "", "fill-opacity": level < 0 ? 0 : STEPS[level] });
      const words = dense.includes(i) ? "left dense" : `${name} ${number(value)}`;
      box.append(svg("title", {}, `${layer}: ${words}, ${fixed(bits[i], 3)} bits`));
      picture.append(box);
      if (few) picture.append(svg("text", { class: `cell${level >= STEPS.length - 2 ? " deep" : ""}`, x: x + cell / 2, y: y + tall / 2 + 3.5, "pointer-events": "none" }, value === null ? (dense.includes(i) ? "dense" : "–") : Number(value.toPrecision(2)).toString()));
    });
    return picture;
  };

  // -- controls ----------------------------------------------------------------------------------------------------

  const update = (change) => { state = { ...state, ...change }; writeFragment(); apply(); };
  const showState = () => { for (const name of ["model", "budget", "stage", "text", "metric", "x"]) if (form.elements[name]) form.elements[name].value = state[name]; };
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", (event) => {
    const field = event.target;
    if (field.type === "checkbox") {
      const picked = every(".choose input").filter((box) => box.checked).map((box) => box.value);
      update({ cols: picked.join("\n") });
    } else if (field.name) update({ [field.name]: field.value });
  });
  form.addEventListener("reset", (event) => {
    event.preventDefault();
    for (const picked of pressed.values()) picked.clear();
    for (const button of every(".legend button")) button.setAttribute("aria-pressed", "false");
    update({ ...START });
    showState();
  });
  const choose = find(".choose");
  find("fieldset", choose).append(...columns.map((title) => el("label", {}, el("input", { type: "checkbox", value: title }), title)));
  choose.hidden = columns.length < 2;
  document.addEventListener("click", (event) => { if (!choose.contains(event.target)) choose.open = false; });
  choose.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && choose.open) { choose.open = false; find("summary", choose).focus(); }
  });

  const theme = find("#theme"), system = matchMedia("(prefers-color-scheme: dark)");
  const stored = () => { try { return localStorage.getItem("evenbits-theme"); } catch { return null; } };
  const setTheme = (name, keep) => {
    if (name) document.documentElement.dataset.theme = name;
    theme.setAttribute("aria-checked", String(name ? name === "dark" : system.matches));
    if (keep) try { localStorage.setItem("evenbits-theme", name); } catch { /* not kept, then */ }
  };
  theme.addEventListener("click", () => setTheme(theme.getAttribute("aria-checked") === "true" ? "light" : "dark", true));
  system.addEventListener("change", () => { if (!document.documentElement.dataset.theme) setTheme("", false); });

  const enter = () => {
    const next = readFragment();
    if (!next) return;
    const trial = next.trial;
    if (KEYS.every((key) => next[key] === state[key])) return; // back from a trial: what is shown, and its focus, stay
    if (dialog.open) { dialog.close(); putBack(); }
    state = { ...next, trial: "" };
    showState();
    apply();
    if (trial) openTrial(trial, undefined, false);
  };
  addEventListener("hashchange", enter);
  let waiting = 0;
  addEventListener("resize", () => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(draw); });

  document.documentElement.classList.add("js");
  theme.hidden = false;
  form.hidden = !lines.length;
  setTheme(stored() || "", false);
  showState();
  apply();
  enter();
})();
