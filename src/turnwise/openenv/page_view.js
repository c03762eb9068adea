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

export const text = (value) => element("pre", {}, value);

/** Any JSON value, indented, its images shown. */
export function json(value) {
  const images = [];
  const lines = element("code");
  const put = (className, content) => lines.append(element("span", { className }, content));
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
    entries.forEach(([key, one], at) => {
      lines.append(flat ? (at ? " " : "") : `\n${inner}`);
      if (key !== null) { put("key", key); lines.append(": "); }
      write(one, inner);
      if (at < entries.length - 1) lines.append(",");
    });
    lines.append(flat ? close : `\n${indent}${close}`);
  };
  write(value, "");
  return element("div", { className: "json" }, element("pre", {}, lines), ...images);
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
