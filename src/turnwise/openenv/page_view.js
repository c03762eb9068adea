// What is seen, as elements. Everything an environment says is text here, never markup.

export function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("aria-") || key === "role") node.setAttribute(key, value);
    else node[key] = value;
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** A number as people write it: `1`, `-0.25`, `0.333`. */
export const short = (value) => (typeof value === "number" ? String(Number(value.toFixed(3))) : String(value));
export const signed = (value) => (value > 0 ? `+${short(value)}` : short(value));

const MAGIC = { iVBORw0KGgo: "png", "/9j/": "jpeg", R0lGOD: "gif", UklGR: "webp" };

/** The `data:` address of what is an image, however it is written; null for anything else. */
export function imageOf(value) {
  if (typeof value !== "string" || value.length < 60) return null;
  if (/^data:image\/(png|jpeg|gif|webp);base64,/.test(value)) return value;
  const start = Object.keys(MAGIC).find((magic) => value.startsWith(magic));
  return start && /^[A-Za-z0-9+/=\s]+$/.test(value) ? `data:image/${MAGIC[start]};base64,${value}` : null;
}

export const picture = (src) => element("img", { src, alt: "image from the environment" });

const MOST = { lines: 40, characters: 4000 };
/** Of what is longer only this much is shown, so that an observation leaves the action before it in sight. */
const LESS = { lines: 14, characters: 1400 };

/** What is folded until a button is pressed; `less` places the button itself. */
function folded(label, less, all) {
  const box = element("div", { className: "fold" });
  const draw = (open) => {
    const toggle = () => { draw(!open); box.querySelector(".more").focus(); };
    const button = element("button", { type: "button", className: "more", "aria-expanded": String(open), onclick: toggle }, open ? "Show less" : label);
    box.replaceChildren(...(open ? [all(), button] : less(button)));
  };
  draw(false);
  return box;
}

/** Text as it is. Of a long one the beginning and, as histories end with what is new, the end. */
export function text(value) {
  const whole = String(value);
  const lines = whole.split("\n");
  const all = () => element("pre", {}, whole);
  if (lines.length <= MOST.lines && whole.length <= MOST.characters) return all();
  const [most, room] = [LESS.lines / 2, LESS.characters / 2];
  const begin = lines.slice(0, most).join("\n").slice(0, room);
  const end = lines.slice(-most).join("\n").slice(-room);
  const label = lines.length > MOST.lines ? `Show all ${lines.length} lines` : `Show all ${whole.length} characters`;
  return folded(label, (button) => [element("pre", {}, begin), button, element("pre", {}, end)], all);
}

/** Any JSON value, indented, its images shown. */
export function json(value) {
  const [node, whole] = written(value, MOST);
  if (whole) return node;
  return folded("Show all", (button) => [written(value, LESS)[0], button], () => written(value)[0]);
}

/** As elements, and whether it is all of it. */
function written(value, most = { lines: Infinity, characters: Infinity }) {
  let { lines: left, characters: room } = most;
  const images = [];
  const lines = element("code");
  const put = (className, content) => {
    lines.append(element("span", { className }, content.slice(0, room)));
    room -= content.length;
  };
  const full = () => left < 0 || room < 0;
  const write = (item, indent) => {
    const image = imageOf(item);
    if (image) {
      images.push(picture(image));
      return put("lit", `image ${images.length}`);
    }
    if (item === null || typeof item === "boolean") return put("lit", String(item));
    if (typeof item === "number") return put("num", String(item));
    if (typeof item === "string") return put("str", JSON.stringify(item));
    const list = Array.isArray(item);
    const entries = list ? item.map((one) => [null, one]) : Object.entries(item);
    const [open, close] = list ? "[]" : "{}";
    if (!entries.length) return lines.append(open + close);
    // Rows of plain values stay on one line: a board looks like one.
    const flat = list && item.every((one) => one === null || (typeof one !== "object" && String(one).length < 24));
    const inner = `${indent}  `;
    lines.append(open);
    for (const [at, [key, one]] of entries.entries()) {
      if (!flat) left -= 1;
      if (full()) return;
      lines.append(flat ? (at ? " " : "") : `\n${inner}`);
      if (key !== null) { put("key", key); lines.append(": "); }
      write(one, inner);
      if (full()) return;
      if (at < entries.length - 1) lines.append(",");
    }
    lines.append(flat ? close : `\n${indent}${close}`);
  };
  write(value, "");
  if (full()) lines.append(" …");
  return [element("div", { className: "json" }, element("pre", {}, lines), ...images), !full()];
}

/** A message's content: text, or blocks of text and images. */
export function content(value) {
  if (typeof value === "string") return [text(value)];
  if (!Array.isArray(value)) return value === null || value === undefined ? [] : [json(value)];
  return value.map((block) => {
    const address = block.image_url?.url ?? (block.type === "image" ? `data:${block.mimeType ?? "image/png"};base64,${block.data}` : null);
    if (address !== null) return imageOf(address) ? picture(address) : text(`image at ${address}`);
    return typeof block.text === "string" ? text(block.text) : json(block);
  });
}

/** One entry of the transcript. */
export function entry({ who, kind, parts, notes = [], details = [] }) {
  return element(
    "li", { className: `entry ${kind}` },
    element("div", { className: "who" }, element("b", {}, who), ...notes),
    element("div", { className: "what" }, ...parts, ...details.map(([label, value]) => element("details", {}, element("summary", {}, label), json(value)))),
  );
}

export const chip = (label, className = "") => element("span", { className: `chip ${className}` }, label);

export function rewardChip(reward) {
  return chip(`reward ${signed(reward)}`, reward > 0 ? "good" : reward < 0 ? "bad" : "");
}

/** `move(direction="left")`: a call as one writes it. */
export function call(name, args) {
  const code = element("code");
  code.append(element("b", {}, name), "(");
  Object.entries(args).forEach(([key, value], at) => {
    code.append(at ? ", " : "", element("span", { className: "key" }, key), "=");
    const kind = typeof value === "string" ? "str" : typeof value === "number" ? "num" : "lit";
    code.append(element("span", { className: kind }, JSON.stringify(value)));
  });
  code.append(")");
  return element("pre", {}, code);
}
