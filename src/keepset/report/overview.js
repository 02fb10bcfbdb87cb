// Below the first screen: what scores are worth, one method's figures, how the methods agree.

const OUTCOMES = { "loss.target": "the target's loss", "loss.target.preference": "the target's preference loss", "loss.heldout": "the held-out loss", "loss.chosen": "the loss of held-out chosen answers", "loss.preference": "the held-out pairs' preference loss", "margin.implicit_mean.matched": "the margin of held-out pairs of like length", "accuracy.policy_mean.matched": "the accuracy on held-out pairs of like length", "gsm8k.accuracy": "GSM8K's exact match" };
const outcomeName = (name) => OUTCOMES[name] || words(name);

// What every score is worth: held against trainings that differ in their rows alone.
function truthSection() {
  const truth = DATA.truth;
  if (!truth || !(truth.designs.length || truth.deciles.length)) return null;
  const place = h("div", {}), views = ["averaged over queries", "of the mean over queries"], named = { halves: "random halves", "leave-out": "rows left out" };
  let design = truth.designs[0], outcome = design && design.outcomes[0], view = 0;
  const draw = () => {
    const shown = outcome.scores.map((r) => ({ label: r.label, control: ["random", "length"].includes(METHODS[r.label]?.name), ...r.views[view] })).filter((r) => isNumber(r.value)).sort((a, b) => b.value - a.value);
    const how = design.name === "halves" ? `${whole(design.models)} models were trained, each on a random half of ${whole(truth.rows)} rows` : `One model was trained on all of ${whole(truth.rows)} rows, ${whole(design.models - 1)} with some left out`;
    const note = `${how}, from the same start in the same order. Dot: rank correlation of a score's sum over a model's rows with ${outcomeName(outcome.name)} of that model, ${views[view]}; line: its 95 % interval over models and queries.` + (isNumber(outcome.ceilings[view]) ? ` The most that can be reached follows from ${whole(design.again)} models trained a second time with another seed.` : "");
    place.replaceChildren(shown.length ? figure(sentence(`for ${outcomeName(outcome.name)}`), (w) => truthChart(w, shown, outcome.ceilings[view], outcomeName(outcome.name)), note, { wide: true }) : h("p", { class: "note" }, `${sentence(outcomeName(outcome.name))} is the same for all models: it orders nothing.`));
  };
  const byName = (list, name) => list.find((one) => one.name === name);
  const outcomes = design ? design.outcomes.map((o) => o.name) : [];
  if (design) draw();
  const tenths = truth.deciles.length > 0 && h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Trainings on tenths" }, h("table", {}, h("thead", {}, h("tr", {}, ["trained on tenths of", "measure", "order", "p"].map((t, i) => h("th", { scope: "col", class: i > 1 ? "num" : "" }, t)))),
    h("tbody", {}, truth.deciles.map((d) => h("tr", {}, h("th", { scope: "row" }, visible(d.label)), h("td", {}, outcomeName(d.outcome)), h("td", { class: "num" }, short(d.spearman, 2)), h("td", { class: "num" }, short(d.p)))))));
  return h("section", { "aria-labelledby": "h-truth" },
    h("div", { class: "bar" }, h("h2", { id: "h-truth" }, "Do the scores say what training does?"),
      design && h("div", { class: "choices" },
        truth.designs.length > 1 && choice("Trainings", truth.designs.map((d) => named[d.name]), named[design.name], (n) => { design = truth.designs.find((d) => named[d.name] === n); outcome = byName(design.outcomes, outcome.name); draw(); }),
        choice("Outcome", outcomes.map(outcomeName), outcomeName(outcome.name), (n) => { outcome = design.outcomes.find((o) => outcomeName(o.name) === n); draw(); }),
        choice("View", views, views[0], (v) => { view = views.indexOf(v); draw(); }))),
    place, tenths);
}

function pointsOf(label, x, y, limit = 6000) {
  const method = ROWS.methods[label], kept = [], rest = [];
  for (let i = 0; i < N; i++) {
    const px = x(method, i), py = y(method, i);
    if (isNumber(px) && isNumber(py)) (method.selected[i] ? kept : rest).push({ x: px, y: py, row: i, kept: !!method.selected[i] });
  }
  // ids are content hashes, so every k-th row in id order is a fair draw
  const thin = (list, room) => { const k = Math.max(1, Math.ceil(list.length / room)); return list.filter((_, i) => i % k === 0); };
  return [...thin(rest, limit / 2), ...thin(kept, limit / 2)];
}

function methodFigures(label) {
  const m = METHODS[label], out = [];
  if (m.histogram) out.push(figure("Scores", (w) => histogramChart(w, m.histogram, m.cut),
    h("span", {}, swatch("kept"), `kept (${whole(m.kept)})  `, swatch("rest"), `not kept (${whole(m.scored - m.kept)}). `, m.histogram.clipped ? `${whole(m.histogram.clipped)} far-out scores stand in the outermost bars.` : "")));
  if (m.has_losses) {
    const per = (name) => (method, i) => (isNumber(method[name][i]) ? method[name][i] / (ROWS.n_tokens[i] || 1) : null);
    const points = pointsOf(label, per("loss_ini"), per("loss_ref"));
    if (points.length) out.push(figure("Loss before and after the reference training", (w) => scatterChart(w, points, { x: "base loss, nats a token", y: "reference loss", alt: `Base loss against reference loss of ${points.length} rows; kept rows lie further below the diagonal if the method finds what can be learned.` }, { diagonal: true }),
      "A row far below the diagonal was learned by the reference model; one on it taught nothing. Point at a dot to read it."));
  }
  const points = pointsOf(label, (_, i) => ROWS.n_tokens[i], (method, i) => method.score[i]);
  if (points.length && m.length) out.push(figure("Score against length", (w) => scatterChart(w, points, { x: "supervised " + UNIT, y: "score", alt: `Score against length of ${points.length} rows; rank correlation ${short(m.length.spearman, 2)}.` }),
    h("span", {}, "Rank correlation ", h("b", {}, short(m.length.spearman, 2)), `, linear ${short(m.length.pearson, 2)}. Mean length: ${short(m.mean_tokens[0])} ${UNIT} in the pool, ${short(m.mean_tokens[1])} kept. `,
      Math.abs(m.length.spearman) >= 0.5 ? h("strong", { class: "flag" }, "The method follows length closely; hold it against the longest rows.") : "")));
  if (m.heat) out.push(figure("What each target task asks for", (w) => heatChart(w, m.heat), "Mean part of the score that each target task gives to a group of rows. Blue-green pulls in, rust pushes out.", { wide: true }));
  const totals = { pool: m.scored, kept: m.kept };
  const mix = Object.entries(m.shares).filter(([, rows]) => rows.length > 1).map(([name, rows]) => figure("Shares by " + name, (w) => shareChart(w, rows, totals), h("span", {}, swatch("rest"), "in the pool  ", swatch("kept"), "kept")));
  if (mix.length) out.push(h("div", { class: "wide mix" }, mix));
  return out;
}
const swatch = (kind) => h("i", { class: "swatch " + kind, "aria-hidden": "true" });

function methodSection() {
  const place = h("div", { class: "figures" }); // filled again for each method
  const draw = (label) => { current = label; place.replaceChildren(...methodFigures(label)); };
  draw(current);
  const labels = DATA.methods.map((m) => m.label);
  return h("section", { "aria-labelledby": "h-method" }, h("div", { class: "bar" }, h("h2", { id: "h-method" }, "How a method scores"), labels.length > 1 && choice("Method", labels, current, draw)), DATA.summary.budgets.length > 1 && h("p", { class: "note" }, `What is kept at the first budget, ${visible(DATA.summary.budgets[0])}.`), place);
}

function overlapSection() {
  const o = DATA.overlap;
  if (!o) return null;
  const cell = (i, j) => {
    if (i === j) return h("td", { class: "self" }, "");
    const value = i > j ? o.jaccard[i][j] : o.spearman[i][j], td = h("td", { class: i > j ? "low" : "up" }, short(value, 2));
    td.style.setProperty("--heat", isNumber(value) ? Math.round(Math.abs(value) * 42) + "%" : "0%");
    return td;
  };
  return h("section", { "aria-labelledby": "h-overlap" }, h("h2", { id: "h-overlap" }, "How the methods agree"),
    h("p", { class: "note" }, "Below the diagonal: share of kept rows in common (Jaccard). Above: rank correlation of the scores."),
    h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Agreement of the methods" }, h("table", { class: "overlap" }, h("thead", {}, h("tr", {}, h("td", {}), o.labels.map((l) => h("th", { scope: "col" }, visible(l))))),
      h("tbody", {}, o.labels.map((l, i) => h("tr", {}, h("th", { scope: "row" }, visible(l)), o.labels.map((_, j) => cell(i, j))))))));
}

function overview() {
  $("panel-overview").append(...[answerSection(), keptSection(), h("div", { class: "two" }, [costSection(), nextSection()].filter(Boolean)), truthSection(), methodSection(), overlapSection()].filter(Boolean));
}
