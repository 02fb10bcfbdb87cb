// Tabs, the quarantine and reproduce panels, and the start.

function quarantinePanel() {
  const panel = $("panel-quarantine"), all = DATA.quarantine, total = DATA.summary.quarantined;
  if (!total) return panel.append(h("h2", {}, "Nothing was quarantined"), h("p", { class: "note" }, "Every row that came in could be used."));
  const reasons = new Map();
  for (const q of all) reasons.set(q.reason || "?", (reasons.get(q.reason || "?") || 0) + 1);
  into(panel, h("h2", {}, `${whole(total)} rows could not be used`),
    h("p", { class: "note" }, "They were set aside, never scored and never dropped in silence. Mend them in the file and run again."),
    h("ul", { class: "reasons" }, [...reasons].sort((a, b) => b[1] - a[1]).map(([reason, n]) => h("li", {}, h("b", {}, whole(n)), " ", h("code", {}, visible(reason))))),
    h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Quarantined rows" }, h("table", {}, h("thead", {}, h("tr", {}, ["file", "line", "reason", "detail", "begins"].map((t, i) => h("th", { scope: "col", class: i === 1 ? "num" : "" }, t)))),
      h("tbody", {}, all.map((q) => h("tr", {}, h("td", {}, h("code", {}, visible(String(q.file ?? "").split("/").pop()))), h("td", { class: "num" }, visible(q.line ?? "")), h("td", {}, h("code", {}, visible(q.reason ?? ""))), h("td", {}, visible(q.detail ?? "")), h("td", { class: "excerpt" }, h("bdi", {}, visible(q.excerpt ?? "")))))))),
    all.length < total && h("p", { class: "note" }, `The first ${whole(all.length)} are shown; quarantine.jsonl holds all.`));
}

function reproducePanel() {
  const panel = $("panel-reproduce"), plain = [], nested = [];
  for (const [key, value] of Object.entries(DATA.manifest)) if (!["recipe", "costs"].includes(key)) (value !== null && typeof value === "object" ? nested : plain).push([key, value]);
  const flat = (value) => value && typeof value === "object" && !Array.isArray(value) && Object.values(value).every((v) => v === null || typeof v !== "object");
  const list = (pairs) => h("dl", { class: "manifest" }, pairs.map(([k, v]) => h("div", {}, h("dt", {}, visible(words(k))), h("dd", {}, visible(v === null ? "–" : v)))));
  into(panel, h("h2", {}, "Run it again"),
    h("p", { class: "note" }, "The recipe and the facts below were written by the run itself."),
    DATA.recipe && h("details", { open: true }, h("summary", {}, "recipe.yaml"), h("pre", { tabindex: 0 }, visible(DATA.recipe))),
    plain.length > 0 && h("details", { open: true }, h("summary", {}, "manifest.json"), list(plain)),
    nested.map(([key, value]) => h("details", {}, h("summary", {}, visible(words(key))), flat(value) ? list(Object.entries(value)) : h("pre", { tabindex: 0 }, visible(JSON.stringify(value, null, 1))))),
    DATA.costs.length > 0 && h("details", { open: true }, h("summary", {}, "What it cost"), h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Costs" }, h("table", {}, h("thead", {}, h("tr", {}, ["stage", "time", "rows", "tokens"].map((t, i) => h("th", { scope: "col", class: i ? "num" : "" }, t)))),
      h("tbody", {}, DATA.costs.map((c) => h("tr", {}, h("th", { scope: "row" }, visible(c.stage ?? "?")), h("td", { class: "num" }, duration(c.seconds)), h("td", { class: "num" }, whole(c.rows)), h("td", { class: "num" }, whole(c.tokens)))))))));
}

const TABS = ["overview", "rows", "quarantine", "reproduce"];
const filled = new Set();
let listed = null; // the method that the table of rows was last sorted for
function show(name, focus) {
  if (!filled.has(name)) {
    filled.add(name);
    ({ overview, rows: rowsPanel, quarantine: quarantinePanel, reproduce: reproducePanel })[name]();
  }
  for (const tab of TABS) {
    const on = tab === name, button = $("tab-" + tab);
    button.setAttribute("aria-selected", String(on));
    button.tabIndex = on ? 0 : -1;
    $("panel-" + tab).hidden = !on;
    if (on && focus) button.focus();
  }
  if (name === "rows" && listed !== current) {
    listed = current;
    for (const [id, value] of [["method", current], ["kept", state.kept], ["search", state.search], ["source", state.source], ["category", state.category]]) if ($(id)) $(id).value = value;
    refreshTable(true);
  }
}

const route = () => { const name = location.hash.slice(1); return TABS.includes(name) ? name : "overview"; };
$("tablist").addEventListener("click", (event) => { const tab = event.target.closest("[role=tab]"); if (tab) location.hash = tab.id.slice(4); });
$("tablist").addEventListener("keydown", (event) => {
  const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key], at = TABS.indexOf(route());
  const to = event.key === "Home" ? 0 : event.key === "End" ? TABS.length - 1 : by ? (at + by + TABS.length) % TABS.length : -1;
  if (to < 0) return;
  event.preventDefault();
  location.hash = TABS[to];
  show(TABS[to], true);
});
addEventListener("hashchange", () => {
  show(route());
  const top = document.querySelector(".head").getBoundingClientRect().height;
  if (scrollY > top) scrollTo(0, top); // a new part starts at its top, below the tabs
});
addEventListener("beforeprint", () => TABS.filter((t) => t !== "rows").forEach((t) => { if (!filled.has(t)) { const now = route(); show(t); show(now); } }));
addEventListener("beforeunload", (event) => { if (marks.size) event.preventDefault(); });
$("drawer").addEventListener("click", (event) => { if (event.target === $("drawer")) $("drawer").close(); });

head();
if (DATA.summary.quarantined) $("tab-quarantine").append(" ", h("span", { class: "badge" }, whole(DATA.summary.quarantined)));
show(route());
