// The first screen: did choosing help, what was kept, what did it cost, what to look at next.

const DATA = JSON.parse($("data").textContent);
const ROWS = DATA.rows, N = ROWS.id.length;
const METHODS = Object.fromEntries(DATA.methods.map((m) => [m.label, m]));
let current = (DATA.methods.find((m) => !m.control) || DATA.methods[0]).label;

const METRICS = new Map(DATA.metrics.map((m) => [m.name, m]));
const lowerIsBetter = (metric) => METRICS.get(metric).lower_is_better;
const UNIT = DATA.summary.unit;

// Bars of a budget on a measure, best first; choices before controls.
function barsOf(metric, budget) {
  const sign = lowerIsBetter(metric) ? 1 : -1;
  return DATA.comparison.filter((b) => b.measures[metric] && isNumber(b.measures[metric].value) && (b.budget === null || b.budget === budget))
    .sort((a, b) => a.control - b.control || sign * (a.measures[metric].value - b.measures[metric].value));
}
const budgetsOf = () => { const found = [...new Set(DATA.comparison.map((b) => b.budget).filter((b) => b !== null))]; return found.length ? found : [null]; };

function head() {
  const sum = DATA.summary, kept = DATA.methods.filter((m) => !m.control);
  $("title").textContent = visible(sum.run);
  document.title = visible(sum.run) + " · keepset report";
  const parts = [`${joined((kept.length ? kept : DATA.methods).map((m) => m.label))} scored ${whole(sum.rows)} rows`];
  if (sum.model) parts.push(`with ${sum.model}`);
  if (sum.targets.length) parts.push(`for ${sum.targets.join(", ")}`);
  $("lede").textContent = visible(parts.join(" ") + (sum.budgets.length ? ` to keep ${sum.budgets.map((b) => (/%|tokens/.test(b) ? b : whole(+b) + " rows")).join(", ")}.` : "."));
  const first = METHODS[current];
  const facts = [["kept", whole(first.kept), `${percent(first.kept, first.scored)} by ${first.label}`],
    [UNIT + " kept", whole(first.kept_tokens), isNumber(sum.tokens) ? percent(first.kept_tokens, sum.tokens) : null],
    ["quarantined", whole(sum.quarantined), null], ["time spent", duration(sum.seconds), null]];
  $("facts").append(...facts.filter((f) => f[1] !== "–").map(([name, value, note]) => h("div", {}, h("dt", {}, name), h("dd", {}, value, note && h("span", {}, " " + visible(note))))));
}

function choice(label, options, value, onchange) {
  return h("label", { class: "choice" }, h("span", {}, label), h("select", { onchange: (e) => onchange(e.target.value) },
    options.map((o) => h("option", { value: o, selected: o === value }, visible(words(o))))));
}

function answerSection() {
  const title = h("h2", { id: "h-quality" }, "Did choosing help?"), metrics = [...METRICS.keys()];
  if (!metrics.length) return h("section", { "aria-labelledby": "h-quality" }, title, h("p", { class: "answer unknown" }, "Not known: nothing was trained and measured. Name held-out pairs or rows under ", h("code", {}, "evaluate"), " in the recipe."));
  const place = h("div", {}), budgets = budgetsOf();
  let metric = metrics[0], budget = budgets[0];
  const draw = () => {
    const shown = barsOf(metric, budget), found = DATA.answers.find((a) => a.measure === metric && a.budget === budget), unit = METRICS.get(metric).unit;
    const children = [];
    if (found) children.push(h("p", { class: "answer " + found.help }, visible(found.sentence)));
    children.push(figure((found && found.title) || words(metric) + (unit && ", " + unit), (w) => answerChart(w, shown, metric), found ? found.note : null, { wide: true }));
    const curves = new Map();
    for (const b of DATA.comparison) if (b.budget !== null && b.measures[metric]) curves.set(b.label, [...(curves.get(b.label) || []), { x: b.n_rows, y: b.measures[metric].value, low: b.measures[metric].low, high: b.measures[metric].high, kind: b.kind }]);
    const series = [...curves].map(([label, points]) => ({ label, kind: points[0].kind, points: points.sort((a, b) => a.x - b.x) })).filter((c) => c.points.length > 1);
    if (series.length) children.push(figure("By budget", (w) => curveChart(w, series, { x: "rows kept", y: words(metric) }), "Mean and its 95 % interval over held-out items.", { wide: true }));
    place.replaceChildren(...children);
  };
  draw();
  return h("section", { "aria-labelledby": "h-quality" },
    h("div", { class: "bar" }, title, budgets.length > 1 && choice("Budget", budgets, budget, (b) => { budget = b; draw(); })),
    place, h("details", { class: "numbers" }, h("summary", {}, "All measures"), metrics.length > 1 && choice("Show above", metrics, metric, (m) => { metric = m; draw(); }), comparisonTable(metrics)));
}

function comparisonTable(metrics) {
  const signed = (value) => (value > 0 ? "+" : "") + short(value);
  const cell = (m) => h("td", { class: "num" }, m ? short(m.value) : "–", m && isNumber(m.low) && h("small", {}, `${short(m.low)} to ${short(m.high)}`), m && m.versus && h("small", {}, `${signed(m.versus.difference)} to random, p ${short(m.versus.p)}`));
  const sized = (b, value) => h("td", { class: "num" }, b.kind === "base" ? "–" : whole(value));
  return h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "All measures" }, h("table", {},
    h("thead", {}, h("tr", {}, ["trained on", "rows", UNIT, "seeds", ...metrics.map(words), "cost"].map((t, i) => h("th", { scope: "col", class: i ? "num" : "" }, visible(t))))),
    h("tbody", {}, DATA.comparison.map((b) => h("tr", {}, h("th", { scope: "row" }, visible(b.label)), sized(b, b.n_rows), sized(b, b.n_tokens), h("td", { class: "num" }, b.seeds), metrics.map((m) => cell(b.measures[m])), h("td", { class: "num" }, duration(b.cost)))))));
}

// A row as two lines, what was asked and what was answered, that opens its drawer.
function rowCard(i, label) {
  const method = ROWS.methods[label], messages = ROWS.messages[i], last = messages.length - 1, line = (text, room) => { const t = text.replace(/\s+/g, " ").trim(); return visible(t.length > room ? t.slice(0, room - 1) + "…" : t); };
  const facts = [isNumber(method.rank[i]) && "rank " + whole(method.rank[i]), "score " + short(method.score[i]), ROWS.categories.length > 1 && categoryOf(i)].filter(Boolean).join(" · ");
  return h("li", {}, h("button", { class: "card", onclick: () => { current = label; openDrawer(i); }, "aria-label": "Open row: " + visible(snippet(i, 60)) },
    h("span", { class: "ask" }, h("bdi", {}, last > 0 ? line(messages[last - 1][1], 110) : "")), h("span", { class: "say" }, h("bdi", {}, messages.length ? line(messages[last][1], 150) : "(text not at hand)")), h("small", {}, visible(facts))));
}

function keptSection() {
  const labels = DATA.methods.filter((m) => !m.control).map((m) => m.label), place = h("div", { class: "sides" });
  if (!labels.length) labels.push(current);
  const draw = (label) => {
    const m = METHODS[label], side = (title, kind, rows, many, link) => h("div", { class: kind }, h("h3", {}, title), h("ul", { class: "cards" }, rows.map((i) => rowCard(i, label))), h("a", { href: "#rows", onclick: () => listRows(label, many) }, link));
    const [kept, left] = DATA.examples[label];
    place.replaceChildren(side("Kept: the best", "kept-side", kept, "kept", `All ${whole(m.kept)} kept rows`), side("Left out: two that just missed it, and the last", "left-side", left, "not kept", `All ${whole(m.scored - m.kept)} rows left out`));
  };
  draw(labels[0]);
  return h("section", { "aria-labelledby": "h-kept" }, h("div", { class: "bar" }, h("h2", { id: "h-kept" }, "What was kept?"), labels.length > 1 && choice("Method", labels, labels[0], draw)), place);
}

function costSection() {
  const prices = DATA.prices, known = prices.methods.some((m) => isNumber(m.share)), most = Math.max(1, ...prices.methods.map((m) => m.share || 0));
  if (!prices.methods.some((m) => isNumber(m.seconds))) return null;
  const times = (share) => (isNumber(share) ? short(share, 2) + " ×" : "–");
  const bar = (share, kind) => { const i = h("i", { class: kind, "aria-hidden": "true" }); i.style.width = Math.max(share > 0 ? 1 : 0, (100 * share) / most) + "%"; return h("td", { class: "barcell" }, i); };
  const line = (name, share, kind, seconds, training) => h("tr", {}, h("th", { scope: "row" }, visible(name)), known && [bar(share || 0, kind), h("td", { class: "num" }, times(share))], h("td", { class: "num" }, duration(seconds)), known && h("td", { class: "num" }, duration(training)));
  return h("section", { "aria-labelledby": "h-cost" }, h("h2", { id: "h-cost" }, "What did it cost?"),
    h("table", { class: "costs" }, h("thead", {}, h("tr", {}, ["choosing by", known && "", known && "work", "time", known && "training on it"].filter((t) => t !== false).map((t, i) => h("th", { scope: "col", class: i ? "num" : "" }, t)))),
      h("tbody", {}, prices.methods.map((m) => line(m.label, m.share, "bar-warm", m.seconds, m.training)), known && line("(whole pool)", 1, "bar-rest", null, null))),
    h("p", { class: "note" }, known && "Work: operations of choosing over those of one training on the whole pool, each method alone.", isNumber(prices.share) && prices.methods.length > 1 && ` Together, what they share done once: ${times(prices.share)}, ${duration(prices.seconds)}.`, isNumber(DATA.summary.seconds) && ` All steps of the run: ${duration(DATA.summary.seconds)}.`));
}

function copyButton(command) {
  const button = h("button", { class: "copy", "aria-label": "Copy the command", onclick: async () => {
    try { await navigator.clipboard.writeText(command); button.textContent = "Copied"; }
    catch { getSelection().selectAllChildren(button.previousSibling); button.textContent = "Selected"; }
    setTimeout(() => (button.textContent = "Copy"), 1600);
  } }, "Copy");
  return button;
}

function finding(kind) {
  const arrows = (text) => visible(sentence(String(text).replaceAll("->", "→")));
  const told = (f) => h("p", {}, f.method && h("span", { class: "who" }, visible(f.method)), arrows(f.text || f.name || ""), isNumber(f.figure) && !/\d/.test(f.text || "") && h("span", { class: "figure" }, Number.isInteger(f.figure) ? whole(f.figure) : short(f.figure)));
  return h("li", { class: kind.level === "warning" ? "warning" : "info" }, h("p", { class: "what" }, h("b", {}, visible(kind.title))),
    kind.findings.slice(0, 1).map(told), kind.findings.length > 1 && h("details", {}, h("summary", {}, "also " + visible(joined([...new Set(kind.findings.slice(1).map((f) => f.method))]))), kind.findings.slice(1).map(told)),
    kind.advice && h("p", { class: "advice" }, arrows(kind.advice)), kind.command && h("p", { class: "command" }, h("code", {}, visible(kind.command).split(" ").flatMap((w) => [h("span", {}, w), " "])), copyButton(kind.command)));
}

function nextSection() {
  const warnings = DATA.findings.filter((k) => k.level === "warning"), first = warnings.slice(0, 3), rest = DATA.findings.filter((k) => !first.includes(k)), more = warnings.length - first.length;
  return h("section", { "aria-labelledby": "h-findings" }, h("h2", { id: "h-findings" }, "What to look at next"),
    first.length ? h("ul", { class: "findings" }, first.map(finding)) : h("p", { class: "note" }, "No warnings."),
    rest.length > 0 && h("details", {}, h("summary", {}, [[more, "more to look at"], [rest.length - more, rest.length - more === 1 ? "note" : "notes"]].filter((p) => p[0]).map((p) => p.join(" ")).join(", ")), h("ul", { class: "findings" }, rest.map(finding))));
}
