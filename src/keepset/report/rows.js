// The table of rows: search, filter, sort, pages, marks; and the drawer with everything about one row.

const PAGE = 50;
const state = { search: "", source: "", category: "", kept: "", sort: "rank", down: false, page: 0, found: [] };
const marks = new Map(); // id -> "keep" | "drop"
let haystack = null;
let refreshTable = () => {}; // set once the table is there; true: search and sort again

const messageText = (i) => ROWS.messages[i].map((m) => m[1]).join("  ");
function snippet(i, room) {
  const text = messageText(i).replace(/\s+/g, " ").trim() || "(text not at hand)";
  return text.length > room ? text.slice(0, room - 1) + "…" : text;
}
const sourceOf = (i) => ROWS.sources[ROWS.source[i]], categoryOf = (i) => ROWS.categories[ROWS.category[i]];

function column(name) {
  if (name === "source") return (i) => sourceOf(i);
  if (name === "category") return (i) => categoryOf(i);
  if (name === "n_tokens") return (i) => ROWS.n_tokens[i];
  const values = ROWS.methods[current][name] || [];
  return (i) => values[i];
}

function search() {
  if (!haystack) haystack = ROWS.id.map((id, i) => (id + " " + sourceOf(i) + " " + categoryOf(i) + " " + messageText(i)).toLowerCase());
  const needle = state.search.trim().toLowerCase(), method = ROWS.methods[current];
  const source = state.source === "" ? -1 : ROWS.sources.indexOf(state.source.slice(1)), category = state.category === "" ? -1 : ROWS.categories.indexOf(state.category.slice(1));
  const found = [];
  for (let i = 0; i < N; i++) {
    if (source >= 0 && ROWS.source[i] !== source) continue;
    if (category >= 0 && ROWS.category[i] !== category) continue;
    if (state.kept === "kept" && !method.selected[i]) continue;
    if (state.kept === "not kept" && method.selected[i]) continue;
    if (state.kept === "marked" && !marks.has(ROWS.id[i])) continue;
    if (needle && !haystack[i].includes(needle)) continue;
    found.push(i);
  }
  const value = column(state.sort), sign = state.down ? -1 : 1;
  const compare = (a, b) => {
    const x = value(a), y = value(b);
    if (x === y) return a - b; // rows stand in id order, so ties do as well
    if (x === null || x === undefined) return 1;
    if (y === null || y === undefined) return -1;
    return (x < y ? -1 : 1) * sign;
  };
  state.found = found.sort(compare);
  state.page = 0;
}

// Have the Rows tab list one side of a method's choice, best first.
function listRows(label, kept) {
  current = label;
  Object.assign(state, { search: "", source: "", category: "", kept, sort: "rank", down: false });
  listed = null;
}

function mark(id, what) {
  if (marks.get(id) === what) marks.delete(id);
  else marks.set(id, what);
  const button = $("download");
  button.hidden = marks.size === 0;
  button.textContent = `Download ${marks.size} override${marks.size === 1 ? "" : "s"}`;
}

function download() {
  const list = (what) => [...marks].filter(([, m]) => m === what).map(([id]) => id).sort();
  const text = JSON.stringify({ keep: list("keep"), drop: list("drop") }, null, 1) + "\n";
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  h("a", { href: url, download: "overrides.json" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

function markButtons(i, after) {
  const id = ROWS.id[i];
  return h("span", { class: "mark", role: "group", "aria-label": "Override for row " + id.slice(0, 8) }, ["keep", "drop"].map((what) =>
    h("button", { class: what, "aria-pressed": String(marks.get(id) === what), title: `Mark: always ${what}`, onclick: (event) => { event.stopPropagation(); mark(id, what); after(what); } }, what)));
}

const COLUMNS = [["rank", "Rank", true], ["score", "Score", true], ["selected", "Kept", false], ["n_tokens", UNIT[0].toUpperCase() + UNIT.slice(1), true], ["source", "Source", false], ["category", "Category", false]];

function rowsPanel() {
  const panel = $("panel-rows"), body = h("tbody", {}), count = h("p", { class: "count", id: "count", "aria-live": "polite" });
  const pager = h("div", { class: "pager" }), headers = new Map();
  const columns = COLUMNS.filter(([name]) => (name !== "category" || ROWS.categories.length > 1) && (name !== "source" || ROWS.sources.length > 1));
  const cells = (i) => {
    const method = ROWS.methods[current];
    return columns.map(([name, , num]) => {
      if (name === "selected") return h("td", {}, method.selected[i] ? h("span", { class: "chip" }, "kept") : "");
      const value = column(name)(i);
      return h("td", { class: num ? "num" : "" }, num ? (name === "score" ? short(value, 4) : whole(value)) : visible(value));
    });
  };
  const render = () => {
    const from = state.page * PAGE, rows = state.found.slice(from, from + PAGE), method = ROWS.methods[current];
    body.replaceChildren(...rows.map((i) => h("tr", { "data-id": ROWS.id[i], onclick: () => openDrawer(i) }, cells(i),
      h("td", { class: "text" }, h("button", { class: "open", "aria-label": "Open row: " + visible(snippet(i, 60)), onclick: (e) => { e.stopPropagation(); openDrawer(i); } }, h("bdi", {}, visible(snippet(i, 160))))),
      h("td", { class: "acts" }, markButtons(i, (what) => { if (state.kept === "marked") update(); else { render(); const again = body.querySelector(`tr[data-id="${CSS.escape(ROWS.id[i])}"] .mark .${what}`); if (again) again.focus(); } })))));
    let tokens = 0, kept = 0, score = 0, scored = 0;
    for (const i of state.found) { tokens += ROWS.n_tokens[i] || 0; kept += method.selected[i] ? 1 : 0; if (isNumber(method.score[i])) { score += method.score[i]; scored += 1; } }
    count.textContent = `${whole(state.found.length)} of ${whole(N)} rows · ${whole(kept)} kept · ${whole(tokens)} ${UNIT} · mean score ${scored ? short(score / scored, 4) : "–"}`;
    const pages = Math.max(1, Math.ceil(state.found.length / PAGE));
    const turn = (text, to, label) => h("button", { disabled: to < 0 || to >= pages, "aria-label": label, onclick: () => { state.page = to; render(); panel.scrollIntoView(); } }, text);
    pager.replaceChildren(turn("← Previous", state.page - 1, "Previous page"), h("span", {}, state.found.length ? `${whole(from + 1)}–${whole(from + rows.length)}` : "no row"), turn("Next →", state.page + 1, "Next page"));
    for (const [name, th] of headers) th.setAttribute("aria-sort", name === state.sort ? (state.down ? "descending" : "ascending") : "none");
  };
  const update = () => { search(); render(); };
  const sortBy = (name) => {
    state.down = state.sort === name ? !state.down : name === "score" || name === "n_tokens" || name === "selected";
    state.sort = name;
    update();
  };
  const pick = (id, label, options, onchange) => h("label", { class: "choice" }, h("span", {}, label), h("select", { id, onchange: (e) => { onchange(e.target.value); update(); } }, options.map(([value, text]) => h("option", { value, selected: label === "Method" && value === current }, visible(text)))));
  const named = (names) => [["", "all"], ...names.map((n) => ["=" + n, n || "(none)"])];
  const labels = DATA.methods.map((m) => [m.label, m.label]);
  into(panel,
    h("h2", { class: "sr" }, "Rows"),
    h("div", { class: "tools" },
      h("label", { class: "choice grow" }, h("span", {}, "Search"), h("input", { id: "search", type: "search", placeholder: "text, id, source …", autocomplete: "off", spellcheck: "false", oninput: (e) => { state.search = e.target.value; update(); } })),
      labels.length > 1 && pick("method", "Method", labels, (v) => (current = v)),
      pick("kept", "Show", [["", "all"], ["kept", "kept"], ["not kept", "not kept"], ["marked", "marked"]], (v) => (state.kept = v)),
      ROWS.sources.length > 1 && pick("source", "Source", named(ROWS.sources), (v) => (state.source = v)),
      ROWS.categories.length > 1 && pick("category", "Category", named(ROWS.categories), (v) => (state.category = v))),
    count,
    DATA.summary.shown < DATA.summary.rows && h("p", { class: "note" }, `${whole(DATA.summary.shown)} of the run's ${whole(DATA.summary.rows)} rows are in this page: every kept one and a fair draw of the others. The figures are over all of them.`),
    DATA.summary.without_text > 0 && h("p", { class: "note" }, `The text of ${whole(DATA.summary.without_text)} rows is missing: their pool file is no longer where the recipe says.`),
    h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Rows" }, h("table", { class: "rows", id: "rowtable" }, h("caption", { class: "sr" }, "Rows of the pool with their scores"),
      h("thead", {}, h("tr", {}, columns.map(([name, title, num]) => { const th = h("th", { scope: "col", class: num ? "num" : "" }, h("button", { "data-sort": name, onclick: () => sortBy(name) }, title)); headers.set(name, th); return th; }), h("th", { scope: "col" }, "Text"), h("th", { scope: "col" }, "Override"))), body)),
    pager);
  $("download").addEventListener("click", download);
  refreshTable = (again) => (again || state.kept === "marked" ? update() : render());
}

// Kept rows that share most word triples with row i.
function neighbours(i, label, most = 3) {
  const grams = (k) => { const list = messageText(k).toLowerCase().split(/\s+/).slice(0, 400), out = new Set(); for (let j = 0; j + 2 < list.length; j++) out.add(list[j] + " " + list[j + 1] + " " + list[j + 2]); return out; };
  const mine = grams(i), chosen = ROWS.methods[label].selected, found = [];
  for (let k = 0, seen = 0; k < N && seen < 4000; k++) {
    if (!chosen[k] || k === i) continue;
    seen += 1;
    const other = grams(k);
    let both = 0;
    for (const g of other) if (mine.has(g)) both += 1;
    const value = both / (mine.size + other.size - both || 1);
    if (value >= 0.05) found.push([value, k]);
  }
  return found.sort((a, b) => b[0] - a[0]).slice(0, most);
}

function verdict(label, i) {
  const m = METHODS[label], method = ROWS.methods[label], score = method.score[i];
  if (!isNumber(score)) return `${label} gave this row no score${m.reasons[ROWS.id[i]] ? ": " + m.reasons[ROWS.id[i]] : ""}.`;
  const place = isNumber(method.rank[i]) ? `rank ${whole(method.rank[i])} of ${whole(m.scored)}` : "no rank";
  if (!isNumber(m.cut)) return `${label}: ${place}; nothing is selected yet.`;
  const gap = Math.abs(score - m.cut);
  if (method.selected[i]) return `Kept by ${label}: ${place}, ${short(gap, 4)} above the lowest kept score.`;
  return score >= m.cut ? `Not kept by ${label} though its score reaches the cut: ${place}. A quota, a token budget or a repeat left it out.` : `Not kept by ${label}: ${place}; it would need ${short(gap, 4)} more.`;
}

// What would turn the decision round, in the method's own terms where they are known (`keepset explain` says the same).
function changeText(label, i) {
  const m = METHODS[label], method = ROWS.methods[label], score = method.score[i], rank = method.rank[i];
  if (!isNumber(score) || !isNumber(m.cut)) return "";
  if (method.selected[i]) return isNumber(m.best_dropped) ? `It goes out once its score falls below ${short(m.best_dropped, 4)}, the next one${rank > 1 ? `, or the budget below ${whole(rank)} rows` : ""}.` : "Only a smaller budget would leave it out.";
  if (score >= m.cut) return "A larger budget, or another quota or dedup setting, would let it in.";
  const wanted = `It comes in at a score of ${short(m.cut, 4)}, or at a budget of ${whole(rank)} rows.`;
  const [ini, ref] = m.has_losses ? [method.loss_ini[i], method.loss_ref[i]] : [null, null];
  if (isNumber(ini) && isNumber(ref) && ini > 0 && Math.abs(score - (ini - ref) / ini) < 1e-6) return `${wanted} With its base loss of ${short(ini)} nats the reference loss would have to be ${short(ini * (1 - m.cut))}, not ${short(ref)}.`;
  const tasks = m.parts.filter((p) => p.startsWith("task.") && isNumber(method[p][i])).sort((a, b) => method[b][i] - method[a][i]);
  return tasks.length && Math.abs(method[tasks[0]][i] - score) < 1e-9 + 1e-6 * Math.abs(score) ? `${wanted} Its best task, ${tasks[0].slice(5)}, gives ${short(method[tasks[0]][i], 4)}.` : wanted;
}

function partsTable(i, label) {
  const method = ROWS.methods[label], parts = METHODS[label].parts.filter((p) => isNumber(method[p][i]));
  if (!parts.length) return null;
  const most = Math.max(...parts.filter((p) => p.startsWith("task.")).map((p) => Math.abs(method[p][i])), 1e-12);
  return h("table", { class: "parts" }, h("caption", {}, "Parts of the score"), h("tbody", {}, parts.map((p) => {
    const bar = p.startsWith("task.") && h("i", { class: method[p][i] < 0 ? "bar-cold" : "bar-warm", "aria-hidden": "true" });
    if (bar) bar.style.width = Math.round((Math.abs(method[p][i]) / most) * 100) + "%";
    return h("tr", {}, h("th", { scope: "row" }, visible(words(p.replace("task.", "task ")))), h("td", { class: "num" }, short(method[p][i], 4)), h("td", { class: "barcell" }, bar));
  })));
}

// What `keepset report --why` stored: tokens whose loss fell or rose, validation rows that pulled up or down.
function whySection(i, label) {
  const found = (ROWS.why[label] || {})[ROWS.id[i]];
  if (!found) return null;
  const sum = (side) => (found.tokens || []).reduce((a, t) => a + (isNumber(t[side]) ? t[side] : 0), 0);
  const token = ([text, before, after]) => {
    const change = before - after, span = h("span", { class: change >= 0 ? "fell" : "rose", title: `${short(before)} → ${short(after)} nats` }, visible(text));
    span.style.setProperty("--heat", Math.round(Math.min(1, Math.abs(change) / 2) * 70) + "%");
    return span;
  };
  const top = (list, sign) => [...list].sort((a, b) => sign * (b[1] - b[2] - (a[1] - a[2]))).filter((t) => sign * (t[1] - t[2]) > 0).slice(0, 3).map((t) => `“${visible(t[0].trim())}” ${short(t[1], 2)} → ${short(t[2], 2)}`).join(", ");
  return h("div", { class: "why" },
    found.tokens && [h("h3", {}, "Tokens whose loss fell, and rose"), h("p", { class: "tokens", dir: "auto" }, found.tokens.map(token)),
      h("p", { class: "note" }, `${short(sum(1))} → ${short(sum(2))} nats in all. Fell most: ${top(found.tokens, 1) || "none"}. Rose most: ${top(found.tokens, -1) || "none"}.`)],
    found.pairs && [h("h3", {}, "Validation rows that pulled it up and down"), h("ul", { class: "pulls" }, found.pairs.map((p) => h("li", {},
      h("b", { class: p.value < 0 ? "down" : "up" }, (p.value > 0 ? "+" : "") + short(p.value)), " ", h("code", {}, visible(p.task)), " ", h("bdi", {}, visible(p.prompt ?? "")), " → ", h("bdi", { class: "chosen" }, visible(p.chosen ?? "")), p.rejected && [" not ", h("bdi", { class: "rejected" }, visible(p.rejected))],
      (p.checkpoints || []).length > 1 && h("small", {}, "by checkpoint: " + p.checkpoints.map((v) => short(v)).join(", "))))),
      h("p", { class: "note" }, "Cosine of the row's step with each row's own gradient, averaged over the checkpoints.", found.left_out > 0 && ` ${whole(found.left_out)} between them are left out.`, found.without && " " + visible(found.without))]);
}

function openDrawer(i) {
  const drawer = $("drawer"), id = ROWS.id[i], at = state.found.indexOf(i);
  const step = (by) => h("button", { disabled: at < 0 || at + by < 0 || at + by >= state.found.length, onclick: () => openDrawer(state.found[at + by]) }, by < 0 ? "↑ Previous" : "↓ Next");
  const near = neighbours(i, current);
  drawer.replaceChildren();
  into(drawer,
    h("div", { class: "drawer-head" }, h("h2", { id: "drawer-title", tabindex: -1 }, "Row ", h("code", {}, id.length > 34 ? id.slice(0, 34) + "…" : visible(id))), h("button", { class: "close", "aria-label": "Close", onclick: () => drawer.close() }, "×")),
    h("p", { class: "verdict", id: "verdict" }, visible(verdict(current, i))),
    h("p", { class: "note", id: "change" }, visible(changeText(current, i))),
    h("div", { class: "drawer-acts" }, markButtons(i, (what) => { openDrawer(i); drawer.querySelector(".mark ." + what).focus(); refreshTable(); }), step(-1), step(1)),
    h("dl", { class: "pairs" }, [["source", sourceOf(i)], ["category", categoryOf(i)], ["supervised " + UNIT, whole(ROWS.n_tokens[i])]].filter((p) => p[1]).map(([k, v]) => h("div", {}, h("dt", {}, k), h("dd", {}, visible(v))))),
    h("div", { class: "messages" }, ROWS.messages[i].length ? ROWS.messages[i].map(([role, text]) => h("div", { class: "message " + (role === "assistant" ? "assistant" : "") }, h("p", { class: "role" }, visible(role)), h("pre", { dir: "auto" }, visible(text)))) : h("p", { class: "note" }, "The text is not at hand: the pool file moved.")),
    whySection(i, current),
    partsTable(i, current),
    DATA.methods.length > 1 && h("table", { class: "parts" }, h("caption", {}, "By each method"), h("thead", {}, h("tr", {}, ["method", "rank", "score", ""].map((t, k) => h("th", { scope: "col", class: k && k < 3 ? "num" : "" }, t)))),
      h("tbody", {}, DATA.methods.map((m) => { const v = ROWS.methods[m.label]; return h("tr", {}, h("th", { scope: "row" }, visible(m.label)), h("td", { class: "num" }, whole(v.rank[i])), h("td", { class: "num" }, short(v.score[i], 4)), h("td", {}, v.selected[i] ? h("span", { class: "chip" }, "kept") : "")); }))),
    near.length > 0 && h("div", { class: "near" }, h("h3", {}, "Most alike among the kept"), h("ul", {}, near.map(([value, k]) => h("li", {}, h("button", { class: "open", onclick: () => openDrawer(k) }, h("bdi", {}, visible(snippet(k, 110)))), h("small", {}, ` ${percent(value, 1)} of word triples shared`))))));
  if (!drawer.open) drawer.showModal();
  drawer.scrollTop = 0;
  drawer.querySelector("#drawer-title").focus({ preventScroll: true });
}
