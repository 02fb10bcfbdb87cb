// Elements, numbers and text. Row text reaches the page through `textContent` only.

const SVG = "http://www.w3.org/2000/svg";
const $ = (id) => document.getElementById(id);

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    node.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return node;
}
// Put children in, leaving out null and false.
const into = (node, ...children) => fill(node, {}, children);
const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const s = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

// Controls that turn, hide or reorder text are shown as what they are.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]/g;
const visible = (text) =>
  String(text).replace(HIDDEN, (c) => "⟨U+" + c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0") + "⟩");

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const whole = (value) => (isNumber(value) ? Math.round(value).toLocaleString("en-US") : "–");
function short(value, digits = 3) {
  if (!isNumber(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size >= 10 && size < 1e5) return String(value).replace("-", "−");
  if (size >= 1e5 || size < 1e-3) return value.toExponential(2).replace("e+", "e").replace("-", "−").replace("e-", "e−");
  const text = size >= 100 ? value.toFixed(1) : size >= 10 ? value.toFixed(2) : value.toFixed(digits);
  return text.replace("-", "−");
}
const fixed = (value, digits) => (+value.toFixed(digits) === 0 ? 0 : value).toFixed(digits).replace("-", "−");
const percent = (part, of) => (of ? ((100 * part) / of).toFixed(part / of < 0.1 ? 1 : 0) + " %" : "–");
function duration(seconds) {
  if (!isNumber(seconds)) return "–";
  if (seconds < 90) return seconds.toFixed(seconds < 10 ? 1 : 0) + " s";
  if (seconds < 5400) return (seconds / 60).toFixed(0) + " min";
  return (seconds / 3600).toFixed(1) + " h";
}
const words = (name) => String(name).replaceAll("_", " ").replace(/(\D)\.(?=\D)/g, "$1, ");

const joined = (names) => names.join(", ").replace(/, ([^,]*)$/, " and $1");
const sentence = (text) => (/^[a-z-]+[ :]/.test(text) ? text[0].toUpperCase() + text.slice(1) : text);

// A figure that draws itself again when its width changes.
function figure(title, draw, caption, options = {}) {
  const holder = h("div", { class: "plot" });
  const node = h("figure", { class: options.wide ? "wide" : "" }, h("h3", {}, title), holder, caption && h("figcaption", {}, caption));
  let width = 0;
  const redraw = () => {
    const now = Math.floor(holder.clientWidth);
    if (now > 0 && now !== width) {
      width = now;
      holder.replaceChildren(draw(width));
    }
  };
  new ResizeObserver(redraw).observe(holder);
  return node;
}

const tip = $("tip");
function showTip(event, lines) {
  tip.replaceChildren(...lines.map((line) => h("div", {}, visible(line))));
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(8, Math.min(event.clientX + 14, innerWidth - box.width - 8)) + "px";
  tip.style.top = Math.max(8, Math.min(event.clientY + 14, innerHeight - box.height - 8)) + "px";
}
const hideTip = () => (tip.hidden = true);
