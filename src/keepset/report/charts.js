// Small SVG charts. Each takes a width in pixels and returns an <svg> with a text alternative.

function scale(low, high, from, to) {
  const span = high - low || 1;
  return (value) => from + ((value - low) / span) * (to - from);
}

function ticks(low, high, count) {
  const span = high - low;
  if (!(span > 0)) return [low];
  const rough = span / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((m) => m >= rough);
  const out = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-6; value += step) out.push(Math.abs(value) < step * 1e-6 ? 0 : value);
  return out;
}
const tickText = (value) => (Math.abs(value) >= 1e5 || (value !== 0 && Math.abs(value) < 1e-3) ? value.toExponential(0) : String(+value.toPrecision(4))).replace("-", "−");

const frame = (width, height, label, ...children) =>
  s("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label }, children);

function axes(box, x, y, labels, domain) {
  const { left, right, top, bottom } = box;
  return s("g", { class: "axes", "aria-hidden": "true" },
    (domain.at || ticks(domain.x[0], domain.x[1], Math.max(2, (right - left) / 90))).map((t) => [
      s("line", { x1: x(t), x2: x(t), y1: bottom, y2: bottom + 4, class: "tick" }),
      s("text", { x: x(t), y: bottom + 17, "text-anchor": "middle" }, tickText(t)),
    ]),
    ticks(domain.y[0], domain.y[1], 4).map((t) => [
      s("line", { x1: left, x2: right, y1: y(t), y2: y(t), class: "grid" }),
      s("text", { x: left - 7, y: y(t) + 4, "text-anchor": "end" }, tickText(t)),
    ]),
    s("line", { x1: left, x2: right, y1: bottom, y2: bottom, class: "axis" }),
    s("text", { x: right, y: bottom + 34, "text-anchor": "end", class: "axis-name" }, labels.x),
    s("text", { x: left - 7 > 30 ? 2 : 0, y: top - 10, "text-anchor": "start", class: "axis-name" }, labels.y));
}

function histogramChart(width, hist, cut) {
  const height = Math.min(340, Math.max(240, width * 0.6)), box = { left: 44, right: width - 8, top: 30, bottom: height - 46 };
  const edges = hist.edges, top = Math.max(...hist.all, 1);
  const x = scale(edges[0], edges[edges.length - 1], box.left, box.right), y = scale(0, top, box.bottom, box.top);
  const gap = (x(edges[1]) - x(edges[0])) > 5 ? 1 : 0;
  const bar = (counts, kind) => counts.map((n, i) => n > 0 && s("rect", {
    x: x(edges[i]), width: Math.max(0.8, x(edges[i + 1]) - x(edges[i]) - gap), y: Math.min(y(n), box.bottom - 1.5), height: Math.max(1.5, box.bottom - y(n)), class: kind,
  }));
  const onMove = (event) => {
    const inside = (event.clientX - event.currentTarget.getBoundingClientRect().left - box.left) / (box.right - box.left);
    const i = Math.floor(inside * hist.all.length);
    if (i < 0 || i >= hist.all.length) return hideTip();
    showTip(event, [`${short(edges[i])} to ${short(edges[i + 1])}`, `${whole(hist.all[i])} rows, ${whole(hist.kept[i])} kept`]);
  };
  const total = hist.all.reduce((a, b) => a + b, 0), kept = hist.kept.reduce((a, b) => a + b, 0);
  const svg = frame(width, height, `Histogram of ${whole(total)} scores from ${short(edges[0])} to ${short(edges[edges.length - 1])}; ${whole(kept)} rows are kept, the lowest kept score is ${short(cut)}.`,
    axes(box, x, y, { x: "score", y: "rows" }, { x: [edges[0], edges[edges.length - 1]], y: [0, top] }), bar(hist.all, "rest"), bar(hist.kept, "kept"));
  if (isNumber(cut)) {
    const at = Math.min(box.right, Math.max(box.left, x(cut))), flip = at > width * 0.66;
    svg.append(s("line", { x1: at, x2: at, y1: box.top - 6, y2: box.bottom, class: "cut" }),
      s("text", { x: at + (flip ? -6 : 6), y: box.top + 2, class: "cut-name", "text-anchor": flip ? "end" : "start" }, "lowest kept " + short(cut)));
  }
  svg.addEventListener("pointermove", onMove);
  svg.addEventListener("pointerleave", hideTip);
  return svg;
}

// points: [{x, y, row, kept}]; thousands of dots are two path elements, not thousands.
function scatterChart(width, points, labels, options = {}) {
  const height = Math.min(340, Math.max(240, width * 0.6)), box = { left: 48, right: width - 10, top: 30, bottom: height - 44 };
  const range = (key) => {
    let low = Infinity, high = -Infinity;
    for (const p of points) { if (p[key] < low) low = p[key]; if (p[key] > high) high = p[key]; }
    const pad = (high - low || 1) * 0.04;
    return [low - pad, high + pad];
  };
  let dx = range("x"), dy = range("y");
  if (options.diagonal) dx = dy = [Math.min(dx[0], dy[0]), Math.max(dx[1], dy[1])];
  const x = scale(dx[0], dx[1], box.left, box.right), y = scale(dy[0], dy[1], box.bottom, box.top);
  const path = (list) => list.map((p) => `M${x(p.x).toFixed(1)} ${y(p.y).toFixed(1)}h0`).join("");
  const spot = s("circle", { r: 6, class: "spot", visibility: "hidden" });
  const kept = points.filter((p) => p.kept), rest = points.filter((p) => !p.kept);
  const svg = frame(width, height, labels.alt,
    axes(box, x, y, labels, { x: dx, y: dy }),
    options.diagonal && s("line", { x1: x(dx[0]), y1: y(dx[0]), x2: x(dx[1]), y2: y(dx[1]), class: "diagonal" }),
    s("path", { d: path(rest), class: "dots rest-dots" + (rest.length > 1500 ? " many" : "") }),
    s("path", { d: path(kept), class: "dots kept-dots" + (kept.length > 1500 ? " many" : "") }), spot);
  const nearest = (event) => {
    const corner = svg.getBoundingClientRect(), px = event.clientX - corner.left, py = event.clientY - corner.top;
    let best = null, least = 196;
    for (const p of points) {
      const d = (x(p.x) - px) ** 2 + (y(p.y) - py) ** 2;
      if (d < least) { least = d; best = p; }
    }
    return best;
  };
  svg.addEventListener("pointermove", (event) => {
    const p = nearest(event);
    svg.classList.toggle("pointing", !!p);
    if (!p) { spot.setAttribute("visibility", "hidden"); return hideTip(); }
    spot.setAttribute("cx", x(p.x)); spot.setAttribute("cy", y(p.y)); spot.setAttribute("visibility", "visible");
    showTip(event, [snippet(p.row, 90), (p.kept ? "kept" : "not kept") + " · " + labels.x + " " + short(p.x) + " · " + labels.y + " " + short(p.y)]);
  });
  svg.addEventListener("pointerleave", () => { spot.setAttribute("visibility", "hidden"); hideTip(); });
  svg.addEventListener("click", (event) => { const p = nearest(event); if (p) openDrawer(p.row); });
  return svg;
}

// bars: choices best first, then controls. A line is the 95 % interval of the difference to Random, put at Random's mean,
// so that it crosses Random's line where the two can't be told apart; without Random it is the mean's own interval.
function answerChart(width, bars, metric) {
  const narrow = width < 560, name = (b) => b.label + (b.kind === "base" ? " (untrained)" : b.kind === "full" ? " (whole pool)" : "");
  const random = bars.find((b) => b.kind === "random"), middle = random ? random.measures[metric].value : null, spread = random ? random.measures[metric].spread : null;
  const rows = bars.map((b) => {
    const m = b.measures[metric], v = m.versus;
    const [low, high] = v && random ? [m.value - v.difference + v.low, m.value - v.difference + v.high] : random ? [null, null] : [m.low, m.high];
    return { ...b, m, low, high, told: v ? v.told : "", words: v && random ? v.told || "not told apart" : "" };
  });
  const widest = Math.max(...rows.map((r) => (r.high - r.low) / 2 || 0)), digits = widest > 0 ? Math.min(6, Math.max(0, Math.ceil(-Math.log10(widest / 3)))) : 3;
  const signed = (value) => (value > 0 ? "+" : "") + fixed(value, digits), mean = (r) => fixed(r.m.value, digits);
  const figures = (r) => (r.m.versus && random ? `${signed(r.m.versus.difference)}  (${signed(r.m.versus.low)} to ${signed(r.m.versus.high)})` : isNumber(r.low) ? `${mean(r)}  (${fixed(r.low, digits)} to ${fixed(r.high, digits)})` : "mean " + mean(r));
  const left = narrow ? 8 : Math.min(200, 40 + 7.4 * Math.max(...rows.map((r) => name(r).length))), room = 7.6 * Math.max(...rows.map((r) => figures(r).length));
  const right = width - (narrow ? 10 : room + (random ? 140 : 24)), step = narrow ? 50 : 32, gap = rows.some((r) => r.control) && rows.some((r) => !r.control) ? 14 : 0, top = 30, height = top + rows.length * step + gap + 44;
  const numbers = rows.flatMap((r) => [r.low, r.high, r.m.value, ...r.m.seeds]).concat(isNumber(spread) ? [middle - spread, middle + spread] : []).filter(isNumber);
  let low = Math.min(...numbers), high = Math.max(...numbers);
  const pad = (high - low || Math.abs(high) || 1) * 0.06;
  low -= pad; high += pad;
  const x = scale(low, high, left, right), bottom = height - 40, better = lowerIsBetter(metric) ? "← better" : "better →";
  const said = (r) => `${name(r)} ${mean(r)}` + (r.m.versus ? `, ${signed(r.m.versus.difference)} to random (${signed(r.m.versus.low)} to ${signed(r.m.versus.high)}), ${r.words || "not told apart"}` : isNumber(r.low) ? ` (${fixed(r.low, digits)} to ${fixed(r.high, digits)})` : "");
  const svg = frame(width, height, `${words(metric)}: ` + rows.map(said).join("; "),
    isNumber(spread) && s("rect", { x: x(middle - spread), width: Math.max(2, x(middle + spread) - x(middle - spread)), y: top - 8, height: bottom - top + 8, class: "band" }),
    s("g", { class: "axes", "aria-hidden": "true" }, ticks(low, high, (right - left) / 90).map((t) => [
      s("line", { x1: x(t), x2: x(t), y1: top - 8, y2: bottom, class: "grid" }), s("text", { x: x(t), y: bottom + 17, "text-anchor": "middle" }, tickText(t))]),
      s("text", { x: lowerIsBetter(metric) ? left : right, y: bottom + 36, "text-anchor": lowerIsBetter(metric) ? "start" : "end", class: "axis-name" }, better),
      !narrow && s("text", { x: width, y: top - 12, "text-anchor": "end", class: "axis-name" }, random ? "difference to random" : "95 % interval")));
  if (random) { const flip = x(middle) > (left + right) / 2; svg.append(s("line", { x1: x(middle), x2: x(middle), y1: top - 14, y2: bottom, class: "cut" }), s("text", { x: x(middle) + (flip ? -5 : 5), y: top - 14, class: "cut-name", "text-anchor": flip ? "end" : "start" }, "random rows")); }
  rows.forEach((r, i) => {
    const y = top + i * step + step / 2 + (r.control ? gap : 0) + (narrow ? 10 : 0), kind = r.control ? "rest" : "kept", v = random ? r.m.versus : null;
    svg.append(s("g", {},
      gap && r.control && (i === 0 || !rows[i - 1].control) && s("line", { x1: 0, x2: width, y1: y - step / 2 - gap / 2 - (narrow ? 10 : 0), y2: y - step / 2 - gap / 2 - (narrow ? 10 : 0), class: "grid" }),
      s("text", narrow ? { x: left, y: y - 12, class: "row-name " + kind } : { x: left - 14, y: y + 5, "text-anchor": "end", class: "row-name " + kind }, name(r)),
      !narrow && r.words && s("text", { x: right + 18, y: y + 5, class: "row-told " + (r.told || "same") }, r.words),
      s("text", { x: narrow ? right : width, y: narrow ? y - 12 : y + 5, "text-anchor": "end", class: "row-value" }, narrow && r.told && s("tspan", { class: "row-told " + r.told }, r.told + "  "), figures(r)),
      isNumber(r.low) && isNumber(r.high) && s("line", { x1: x(r.low), x2: x(r.high), y1: y, y2: y, class: "whisker " + kind }),
      r.m.seeds.length > 1 && r.m.seeds.map((v) => s("circle", { cx: x(v), cy: y, r: 3, class: "seed " + kind })),
      s("circle", { cx: x(r.m.value), cy: y, r: 6, class: `point ${kind}${v && !r.told ? " hollow" : ""}` })));
  });
  return svg;
}

// rows: [{label, control, value, low, high}] best first; 0 is chance, `ceiling` (or null) the most that can be reached.
function truthChart(width, rows, ceiling, title) {
  const narrow = width < 520, left = narrow ? 8 : Math.min(190, 60 + 7 * Math.max(...rows.map((r) => r.label.length)));
  const right = width - (narrow ? 12 : 172), step = narrow ? 52 : 32, top = 46, height = top + rows.length * step + 44;
  const low = Math.min(-0.1, ...rows.map((r) => r.low)) - 0.04, high = Math.max(ceiling || 0, 0.4, ...rows.map((r) => r.high)) + 0.04;
  const x = scale(low, high, left, right);
  const mark = (at, text, kind, row) => [
    s("line", { x1: x(at), x2: x(at), y1: top - 8, y2: height - 42, class: kind }),
    s("text", { x: x(at), y: top - 14 - 14 * row, class: "cut-name", "text-anchor": x(at) > (left + right) / 2 ? "end" : "start" }, text)];
  const close = isNumber(ceiling) && x(ceiling) - x(0) < 220;
  return frame(width, height, `${title}: ` + rows.map((r) => `${r.label} ${short(r.value, 2)} (${short(r.low, 2)} to ${short(r.high, 2)})`).join("; ") + (isNumber(ceiling) ? `; the most that can be reached ${short(ceiling, 2)}` : ""),
    s("g", { class: "axes", "aria-hidden": "true" }, ticks(low, high, (right - left) / 90).map((t) => [
      s("line", { x1: x(t), x2: x(t), y1: top - 8, y2: height - 42, class: "grid" }),
      s("text", { x: x(t), y: height - 26, "text-anchor": "middle" }, tickText(t))]),
      s("text", { x: left, y: height - 6, class: "axis-name" }, "← says the opposite"),
      s("text", { x: right, y: height - 6, "text-anchor": "end", class: "axis-name" }, "says what training does →")),
    mark(0, "a random score", "cut", close ? 1 : 0),
    isNumber(ceiling) && mark(ceiling, "the most that can be reached", "cut ceiling", 0),
    rows.map((r, i) => {
      const y = top + i * step + step / 2 + (narrow ? 10 : 0), kind = r.control ? "rest" : "kept";
      return s("g", {},
        narrow ? s("text", { x: left, y: y - 12, class: "row-name" }, r.label) : s("text", { x: left - 14, y: y + 5, "text-anchor": "end", class: "row-name" }, r.label),
        s("text", { x: narrow ? right : width, y: narrow ? y - 12 : y + 5, "text-anchor": "end", class: "row-value" }, `${short(r.value, 2)}  [${short(r.low, 2)}, ${short(r.high, 2)}]`),
        s("line", { x1: x(r.low), x2: x(r.high), y1: y, y2: y, class: "whisker " + kind }),
        s("circle", { cx: x(r.value), cy: y, r: 5.5, class: "point " + kind }));
    }));
}

function shareChart(width, rows, totals) {
  const step = 42, height = rows.length * step + 4, most = Math.max(...rows.flatMap((r) => [r.pool / totals.pool, r.kept / (totals.kept || 1)]), 0.01);
  const x = scale(0, most, 0, width - 2);
  return frame(width, height, "Shares before and after: " + rows.map((r) => `${r.name} ${percent(r.pool, totals.pool)} to ${percent(r.kept, totals.kept)}`).join("; "),
    rows.map((r, i) => {
      const y = i * step, before = r.pool / totals.pool, after = r.kept / (totals.kept || 1);
      const name = visible(r.name), room = Math.floor((width - 120) / 7);
      return s("g", {},
        s("text", { x: 0, y: y + 14, class: "row-name" }, name.length > room ? name.slice(0, room - 1) + "…" : name),
        s("text", { x: width, y: y + 14, "text-anchor": "end", class: "row-value" }, `${percent(r.pool, totals.pool)} → ${percent(r.kept, totals.kept)}`),
        s("rect", { x: 0, y: y + 20, width: Math.max(1, x(before)), height: 5, class: "rest" }),
        s("rect", { x: 0, y: y + 26, width: Math.max(after > 0 ? 1 : 0, x(after)), height: 7, class: "kept" }));
    }));
}

function heatChart(width, heat) {
  const narrow = width < 520, left = narrow ? 92 : 150, cell = (width - left) / heat.tasks.length, tall = 32, top = 30;
  const height = top + heat.groups.length * tall + 2, all = heat.mean.flat().filter(isNumber).map(Math.abs), most = Math.max(...all, 1e-12);
  const cutText = (text, room) => { const t = visible(text); return t.length > room ? t.slice(0, Math.max(1, room - 1)) + "…" : t; };
  const numbers = cell >= 44, decimals = Math.min(6, Math.max(1, 1 - Math.floor(Math.log10(most))));
  const cellText = (value) => (isNumber(value) ? value.toFixed(decimals).replace("-", "−") : "–");
  return frame(width, height, "Mean part of the score by group and task: " + heat.groups.slice(0, 2).map((g, i) => g + " " + heat.tasks.map((t, j) => `${t} ${short(heat.mean[i][j])}`).join(", ")).join("; "),
    heat.tasks.map((task, j) => s("text", { x: left + (j + 0.5) * cell, y: 18, "text-anchor": "middle", class: "row-name" }, cutText(task, Math.floor(cell / 7.4)), s("title", {}, visible(task)))),
    heat.groups.map((group, i) => [
      s("text", { x: left - 12, y: top + i * tall + 21, "text-anchor": "end", class: i < 2 ? "row-name strong" : "row-name" }, cutText(group, Math.floor(left / 7.6))),
      heat.tasks.map((task, j) => {
        const value = heat.mean[i][j];
        return s("g", {},
          s("rect", { x: left + j * cell + 1, y: top + i * tall + (i > 1 ? 1 : 1), width: Math.max(1, cell - 2), height: tall - 2, rx: 2, class: value < 0 ? "cold" : "warm", "fill-opacity": isNumber(value) ? (0.06 + 0.52 * Math.abs(value) / most).toFixed(3) : 0 },
            s("title", {}, visible(`${group}, ${task}: ${short(value, 4)}`))),
          numbers && s("text", { x: left + (j + 0.5) * cell, y: top + i * tall + 21, "text-anchor": "middle", class: "cell", "aria-hidden": "true" }, cellText(value)));
      })]));
}

// series: [{label, kind, points: [{x, y, low, high}]}]
function curveChart(width, series, labels) {
  const height = 280, box = { left: 48, right: width - 100, top: 30, bottom: 236 };
  const xs = series.flatMap((c) => c.points.map((p) => p.x)), ys = series.flatMap((c) => c.points.flatMap((p) => [p.y, p.low, p.high])).filter(isNumber);
  const pad = (Math.max(...ys) - Math.min(...ys) || 1) * 0.06, dx = [Math.min(...xs), Math.max(...xs)], dy = [Math.min(...ys) - pad, Math.max(...ys) + pad];
  const x = scale(dx[0], dx[1], box.left + 8, box.right - 8), y = scale(dy[0], dy[1], box.bottom, box.top);
  const ends = [];
  return frame(width, height, `${labels.y} by ${labels.x}: ` + series.map((c) => c.label + " " + c.points.map((p) => `${whole(p.x)}: ${short(p.y)}`).join(", ")).join("; "),
    axes(box, x, y, labels, { x: dx, y: dy, at: new Set(xs).size <= 6 ? [...new Set(xs)] : null }),
    series.sort((a, b) => b.points[b.points.length - 1].y - a.points[a.points.length - 1].y).map((c, i) => {
      const kind = c.kind === "method" ? "kept" : "rest", last = c.points[c.points.length - 1];
      let at = y(last.y) + 4;
      while (ends.some((e) => Math.abs(e - at) < 14)) at += 14;
      ends.push(at);
      return s("g", { class: "line-" + (i % 4) },
        c.points.map((p) => isNumber(p.low) && s("line", { x1: x(p.x), x2: x(p.x), y1: y(p.low), y2: y(p.high), class: "whisker thin " + kind })),
        s("polyline", { points: c.points.map((p) => x(p.x) + "," + y(p.y)).join(" "), class: "curve " + kind }),
        c.points.map((p) => s("circle", { cx: x(p.x), cy: y(p.y), r: 4, class: "point " + kind })),
        s("text", { x: box.right + 4, y: at, class: "row-name" }, c.label));
    }));
}
