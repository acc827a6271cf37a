"use strict";
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const byId = id => document.getElementById(id);

// -- numbers and elements ------------------------------------------------------------------------------------

const TYPES = { i4: Int32Array, f4: Float32Array, f8: Float64Array };
const unpack = ({ type, data }) => new TYPES[type](Uint8Array.from(atob(data), c => c.charCodeAt(0)).buffer);

// as the rest of the page prints them
const signed = (value, digits = 3) => {
  const [mantissa, power] = Math.abs(value).toExponential(digits - 1).split("e");
  const sign = value < 0 ? "−" : "+";
  if (Number(power) >= -4 && Number(power) < digits) return sign + Math.abs(value).toPrecision(digits);
  return `${sign}${mantissa}×10${[...String(Number(power))].map(c => "⁰¹²³⁴⁵⁶⁷⁸⁹"[c] ?? "⁻").join("")}`;
};
const many = value => value.toLocaleString("en");
const kind = value => (value > 0 ? "help" : "harm");

const element = (name, attributes = {}, ...children) => {
  const made = /^(svg|rect|line|polyline|circle|title)$/.test(name)
    ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  Object.entries(attributes).forEach(([key, value]) => made.setAttribute(key, value));
  made.append(...children);
  return made;
};

// -- the samples ---------------------------------------------------------------------------------------------

const data = {{ data|tojson }};
const several = data.queries.length > 1;
const [ids, score, labels] = [data.ids, data.score, data.labels.codes].map(unpack);
const harmed = several ? unpack(data.harmed) : null, byQuery = several ? unpack(data.scores) : null;
const [groupStarts, groupCodes] = data.groups ? [data.groups.starts, data.groups.codes].map(unpack) : [];
const groupsOf = i => groupCodes ? groupCodes.subarray(groupStarts[i], groupStarts[i + 1]) : [];  // their numbers
const [starts, steps, rowScores] = [data.rows.starts, data.rows.steps, data.rows.scores].map(unpack);
const dynamics = data.dynamics && Object.fromEntries(Object.entries(data.dynamics).map(([k, v]) => [k, unpack(v)]));
const n = ids.length, q = data.queries.length;
const position = new Map([...ids].map((id, i) => [id, i]));
const suggestedOf = i => dynamics.suspicion[i] > 0 && dynamics.suggested[i] >= 0 ? String(data.classes?.[dynamics.suggested[i]] ?? dynamics.suggested[i]) : "";
const labelOf = i => data.labels.names[labels[i]] ?? "";
const ranked = [...score.keys()].sort((i, j) => Math.abs(score[j]) - Math.abs(score[i]));
const contents = new Map(all("[data-sample]", byId("contents").content).map(held => [Number(held.dataset.sample), held]));

const contentOf = id => {
  const held = contents.get(id);
  return held && element("div", { class: "content" }, ...[...held.childNodes].map(node => document.importNode(node, true)));
};

// -- queries -------------------------------------------------------------------------------------------------

const select = byId("view");
if (select) {
  const [previous, next] = ["previous", "next"].map(byId);
  const go = index => {
    select.selectedIndex = index;
    all(".view").forEach((view, i) => { view.hidden = i !== index; });
    previous.disabled = index === 0;
    next.disabled = index === select.options.length - 1;
  };
  select.addEventListener("change", () => go(select.selectedIndex));
  previous.addEventListener("click", () => go(select.selectedIndex - 1));
  next.addEventListener("click", () => go(select.selectedIndex + 1));
  go(select.selectedIndex);  // a browser may remember the choice
}

// -- tables that are sorted ----------------------------------------------------------------------------------

const compare = (x, y) => {
  const [p, q] = [x, y].map(text => text.trim() === "" ? NaN : Number(text));
  return Number.isNaN(p) || Number.isNaN(q) ? x.localeCompare(y) : p - q;
};
const sortable = (table, sort) => all("th", table).forEach((head, column) => {
  head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") === "descending";
    all("th", table).forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    sort(column, up ? 1 : -1);
  });
});
all("table.sortable").forEach(table => sortable(table, (column, direction) => {
  const value = row => row.cells[column].dataset.value, body = table.tBodies[0];
  body.append(...[...body.rows].sort((a, b) => direction * compare(value(a), value(b))));
}));

// -- all samples: found, sorted, listed ----------------------------------------------------------------------

const PAGE = 1000;  // rows at a time
const table = byId("table"), body = table.tBodies[0], search = byId("search"), whiches = all("[data-which]");
const rows = new Map(all("tr", body).map(row => [Number(row.cells[0].dataset.value), row]));
const thumbnails = new Set();
const WHICH = { all: () => true, helpful: i => score[i] >= 0, harmful: i => score[i] <= 0, suspects: i => dynamics.suspicion[i] > 0 };
let which = "all", one = null, limit = PAGE, sorted = ranked, matching = [];  // one: the sample of the card that was chosen

const rowOf = i => {
  const cell = (value, text, look = "") => element("td", { "data-value": value, class: look }, text);
  let row = rows.get(ids[i]);
  if (!row) {
    row = element("tr", {}, cell(ids[i], element("button", { class: "id", type: "button" }, String(ids[i]))),
      cell(labelOf(i), labelOf(i)), cell(score[i], signed(score[i]), `right number ${kind(score[i])}`));
    if (several) row.append(cell(harmed[i], `${Math.round(100 * harmed[i])} %`, `right number${dynamics ? " extra" : ""}`));
    if (dynamics) {
      const number = (value, text) => Number.isNaN(value) ? cell("", "", "right number extra") : cell(value, text, "right number extra");
      row.append(number(dynamics.suspicion[i], signed(dynamics.suspicion[i])), cell(suggestedOf(i), suggestedOf(i)), number(dynamics.loss[i], signed(dynamics.loss[i]).slice(1)));
    }
    rows.set(ids[i], row);
  }
  const image = !thumbnails.has(ids[i]) && contents.get(ids[i])?.querySelector("img");
  if (image) {
    thumbnails.add(ids[i]);
    row.cells[0].prepend(element("img", { class: `thumbnail ${image.className}`, alt: "", src: image.getAttribute("src") }));
  }
  return row;
};

const find = () => {
  const wanted = search.value.trim().toLowerCase(), group = Number(byId("group")?.value || -1);
  const matches = i => (one === null ? String(ids[i]).includes(wanted) || labelOf(i).toLowerCase().includes(wanted) : ids[i] === one)
    && WHICH[which](i) && (group < 0 || groupsOf(i).includes(group));
  matching = sorted.filter(matches);
  const exact = matching.findIndex(i => String(ids[i]) === wanted);
  if (exact > 0) matching.unshift(...matching.splice(exact, 1));
  limit = PAGE;
  list();
};
const list = () => {
  body.replaceChildren(...matching.slice(0, limit).map(rowOf));
  byId("count").textContent = `${many(matching.length)} of ${many(n)}`;
  byId("nothing").hidden = matching.length > 0;
  byId("more").hidden = matching.length <= limit;
  byId("more").textContent = `Show ${many(Math.min(PAGE, matching.length - limit))} more of ${many(matching.length - limit)}`;
  byId("save").disabled = matching.length === 0;
};

sortable(table, (column, direction) => {
  const keys = [i => ids[i], labelOf, i => score[i], ...(several ? [i => harmed[i]] : []),
    ...(dynamics ? [i => dynamics.suspicion[i], suggestedOf, i => dynamics.loss[i]] : [])], key = keys[column];
  const known = i => Number.isNaN(key(i)) ? -Infinity : key(i);  // what is not known comes last
  const order = typeof key(0) === "string" ? (i, j) => compare(key(i), key(j)) : (i, j) => (known(i) > known(j)) - (known(i) < known(j));
  sorted = [...ranked].sort((i, j) => direction * order(i, j));
  find();
});
search.addEventListener("input", () => { one = null; find(); });
byId("group")?.addEventListener("change", find);
byId("more").addEventListener("click", () => { limit += PAGE; list(); });
whiches.forEach(button => button.addEventListener("click", () => {
  which = button.dataset.which;
  whiches.forEach(other => other.setAttribute("aria-pressed", String(other === button)));
  const head = which === "suspects" && byId("by-suspicion");
  if (head && head.getAttribute("aria-sort") !== "descending") head.querySelector("button").click();
  find();
}));
const show = (text, chosen) => {  // nothing but what is asked for
  search.value = text;
  if (byId("group")) byId("group").value = "";
  whiches.find(button => button.dataset.which === chosen).click();
  byId("all").scrollIntoView();
};
byId("doubted")?.addEventListener("click", () => { one = null; show("", "suspects"); });

// the samples that match, in the order shown, as CSV; a text that a spreadsheet would run as a formula is quoted
byId("save").addEventListener("click", () => {
  const exact = value => String(Number(value.toPrecision(9))), text = value => `"${(/^[=+\-@\t\r]/.test(value) ? "'" : "") + value.replaceAll('"', '""')}"`;
  const known = value => Number.isNaN(value) ? "" : exact(value);
  const each = several && data.m === n ? data.queries : [];
  const lines = matching.map(i => [ids[i], text(labelOf(i)), exact(score[i]), ...(several ? [exact(harmed[i])] : []),
    ...(dynamics ? [known(dynamics.suspicion[i]), text(suggestedOf(i)), known(dynamics.loss[i])] : []), ...each.map((_, k) => exact(byQuery[i * q + k]))].join(","));
  const head = ["sample_id", "label", "score", ...(several ? ["harmed"] : []), ...(dynamics ? ["suspicion", "suggested", "loss"] : []), ...each.map(text)].join(",");
  const file = URL.createObjectURL(new Blob([[head, ...lines, ""].join("\n")], { type: "text/csv" }));
  element("a", { href: file, download: "influence.csv" }).click();
  setTimeout(() => URL.revokeObjectURL(file), 10000);
});

// -- one sample in full --------------------------------------------------------------------------------------

const WIDTH = 320, HEIGHT = 84;
const chart = (label, ...marks) => element("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label }, ...marks);
const bars = (values, names, label) => {
  const high = Math.max(0, ...values), low = Math.min(0, ...values), scale = (HEIGHT - 4) / (high - low || 1);
  const zero = 2 + high * scale, width = WIDTH / Math.max(values.length, 8);
  return chart(label, ...values.map((value, k) => element("rect", {
    x: k * width, width: 0.8 * width, y: value > 0 ? zero - value * scale : zero, height: Math.max(Math.abs(value) * scale, 0.5),
    fill: `var(--${kind(value)})`,
  }, element("title", {}, names[k]))), element("line", { x1: 0, x2: WIDTH, y1: zero, y2: zero, stroke: "var(--line)" }));
};
const curve = (values, names, label) => {
  const high = Math.max(...values) || 1, at = k => [values.length > 1 ? 4 + k * (WIDTH - 8) / (values.length - 1) : WIDTH / 2, HEIGHT - 4 - values[k] * (HEIGHT - 10) / high];
  return chart(label, element("line", { x1: 0, x2: WIDTH, y1: HEIGHT - 3, y2: HEIGHT - 3, stroke: "var(--line)" }),
    element("polyline", { points: values.map((_, k) => at(k).join()).join(" "), fill: "none", stroke: "var(--ink)", "stroke-width": 1.5 }),
    ...values.map((_, k) => element("circle", { cx: at(k)[0], cy: at(k)[1], r: 3, fill: "var(--ink)" }, element("title", {}, names[k]))));
};
const part = (title, ...children) => element("section", { class: "part" }, element("h4", {}, title), ...children);

const moved = (i, direction) => {  // the queries that a sample helps or harms most
  const own = k => byQuery[i * q + k], chosen = [...Array(q).keys()].filter(k => direction * own(k) > 0);
  return chosen.sort((a, b) => direction * (own(b) - own(a))).slice(0, 4).map(k => {
    const shown = document.querySelector(`#view-${k + 1} .asked .content`);
    return element("li", {}, ...(shown ? [shown.cloneNode(true)] : []),
      element("span", {}, `query ${data.queries[k]}`), element("strong", { class: `number ${kind(own(k))}` }, signed(own(k))));
  });
};
const neighbours = i => {  // by the cosine of their scores over the queries
  const norm = j => Math.hypot(...byQuery.subarray(j * q, (j + 1) * q)) || 1;
  const own = byQuery.subarray(i * q, (i + 1) * q), found = [];
  for (let j = 0; j < data.m; j++) {
    if (j === i) continue;
    let dot = 0;
    for (let k = 0; k < q; k++) dot += own[k] * byQuery[j * q + k];
    found.push([dot / (norm(i) * norm(j)), j]);
  }
  return found.sort((a, b) => b[0] - a[0]).slice(0, 6).map(([cosine, j]) => element("li", { class: "card", "data-open": ids[j] },
    contentOf(ids[j]) ?? "", element("button", { class: "id", type: "button" }, `sample ${ids[j]}`), element("span", { class: "label" },
      [labelOf(j) && `label ${labelOf(j)}`, `alike ${cosine.toFixed(2)}`].filter(Boolean).join(", "))));
};

const open = id => {
  const i = position.get(id), detailed = i < data.m, shown = contentOf(id);
  const place = [...score].filter(other => kind(other) === kind(score[i]) && Math.abs(other) > Math.abs(score[i])).length + 1;
  const told = [["score", element("strong", { class: `number ${kind(score[i])}` }, signed(score[i]))],
    ["rank", `number ${many(place)} of those that ${kind(score[i])}, among ${many(n)} samples`]];
  if (labelOf(i)) told.push(["label", labelOf(i)]);
  const groups = new Set([...groupsOf(i)].map(number => data.groups.names[number]).filter(name => name !== labelOf(i)));
  if (groups.size) told.push([groups.size > 1 ? "groups" : "group", [...groups].join(", ")]);
  if (several) told.push(["harms", `${Math.round(100 * harmed[i])} % of the queries`]);
  const losses = dynamics && detailed ? [...dynamics.losses.subarray(dynamics.starts[i], dynamics.starts[i + 1])] : [];
  if (dynamics && !Number.isNaN(dynamics.loss[i])) {
    told.push(["mean loss", dynamics.loss[i].toPrecision(3)]);
    if (suggestedOf(i)) told.push(["suggested label", `${suggestedOf(i)}, preferred at ${Math.round(100 * dynamics.share[i])} % of the visits`]);
  }
  const parts = [shown ?? element("p", { class: "meta" }, `What it is, is not in this page, which holds the ${many(contents.size)} samples of the largest scores and those on cards. It is sample ${id} of the training dataset.`),
    element("dl", { class: "facts" }, ...told.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]))];
  const tokens = document.querySelector(`[data-tokens="${id}"]`);
  if (tokens) parts.push(part("Score of each token", tokens.cloneNode(true)));
  if (detailed) {
    const from = starts[i], to = starts[i + 1], own = [...rowScores.subarray(from, to)];
    parts.push(part("Score by step", bars(own, own.map((value, k) => `step ${steps[from + k]}: ${signed(value)}`), `Scores at ${own.length} steps`)));
    if (losses.length) parts.push(part("Loss at its visits", curve(losses, losses.map((value, k) => `visit ${k + 1}: ${value.toPrecision(3)}`), `Losses at ${losses.length} visits`)));
    if (several) {
      parts.push(part("Score by query", bars([...byQuery.subarray(i * q, (i + 1) * q)], data.queries.map((name, k) => `query ${name}: ${signed(byQuery[i * q + k])}`), `Scores for ${q} queries`)));
      for (const [title, direction] of [["Helps most", 1], ["Harms most", -1]]) {
        const list = moved(i, direction);
        if (list.length) parts.push(part(title, element("ul", { class: "moved" }, ...list)));
      }
      parts.push(part("Neighbours in influence", element("p", { class: "meta" }, `Samples that act alike on the queries${data.m < n ? `, among ${many(data.m)} samples` : ""}.`), element("ol", { class: "cards" }, ...neighbours(i))));
    }
  } else parts.push(element("p", { class: "meta" }, `Scores by step and query are in this page for ${many(data.m)} samples; those of the others are in the report file.`));
  byId("sample-title").textContent = `Sample ${id}`;
  byId("sample-body").replaceChildren(...parts);
  byId("sample").hidden = false;
  byId("sample").scrollTop = 0;
  all("tr.open", body).forEach(row => row.classList.remove("open"));
  rowOf(i).classList.add("open");
};

body.addEventListener("click", event => {
  const row = event.target.closest("tr");
  if (row && getSelection().isCollapsed) open(Number(row.cells[0].dataset.value));
});
byId("sample").addEventListener("click", event => {
  const card = event.target.closest("[data-open]");
  if (card) open(Number(card.dataset.open));
});
byId("close").addEventListener("click", () => {
  byId("sample").hidden = true;
  all("tr.open", body).forEach(row => row.classList.remove("open"));
});
all("main .card, .texts > li").forEach(card => card.addEventListener("click", () => {
  if (!getSelection().isCollapsed) return;
  one = Number(card.querySelector(".id").dataset.sample);
  show(one, "all");
  open(one);
  search.focus({ preventScroll: true });
}));
find();
