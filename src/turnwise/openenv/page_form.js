// Forms from JSON schemas: enum as select, numbers with their ranges, booleans; JSON for the rest.

import { element } from "./page_view.js";

/** The schema that a `$ref`, an only `allOf` or an "or null" stands for. */
function plain(schema, root) {
  let found = schema;
  for (let hops = 0; hops < 20; hops++) {
    const { $ref, allOf, anyOf, oneOf, ...own } = found;
    const options = (anyOf ?? oneOf)?.filter((option) => option.type !== "null");
    if ($ref?.startsWith("#/")) {
      const target = $ref.slice(2).split("/").reduce((node, key) => node?.[key.replaceAll("~1", "/").replaceAll("~0", "~")], root);
      found = { ...target, ...own };
    } else if (allOf?.length === 1) found = { ...allOf[0], ...own };
    else if (options?.length === 1) found = { ...options[0], ...own, nullable: true };
    else break;
  }
  if (Array.isArray(found.type)) {
    const types = found.type.filter((type) => type !== "null");
    if (types.length === 1) found = { ...found, type: types[0] };
  }
  return found;
}

/** What can be acted with, of an action's schema: its variants where it is a union, itself otherwise. */
export function variants(schema) {
  const options = (schema.oneOf ?? schema.anyOf)?.map((option) => plain(option, schema));
  if (options?.every((option) => option.properties)) return options.map((option) => ({ $defs: schema.$defs, ...option }));
  return schema.properties ? [schema] : [];
}

/** The values that a schema fixes: `{"type": "reply"}`. */
export function constants(schema) {
  const found = {};
  for (const [name, property] of Object.entries(schema.properties ?? {})) {
    const { const: value } = plain(property, schema);
    if (value !== undefined) found[name] = value;
  }
  return found;
}

/**
 * Draw a form.
 * @returns {{fields: HTMLElement[], read: () => object, fill: (values: object) => void}} `read` throws what is wrong,
 *   with the `input` that it is about.
 */
export function form(schema, { skip = [] } = {}) {
  const required = new Set(schema.required ?? []);
  const parts = [];
  for (const [name, property] of Object.entries(schema.properties ?? {})) {
    const found = plain(property, schema);
    if (found.const === undefined && !skip.includes(name)) parts.push(field(name, found, required.has(name)));
  }
  return {
    fields: parts.map((part) => part.node),
    read() {
      const values = constants(schema);
      for (const part of parts) {
        const value = part.read();
        if (value !== undefined) values[part.name] = value;
      }
      return values;
    },
    fill: (values) => parts.forEach((part) => part.fill(values?.[part.name])),
  };
}

function field(name, schema, required) {
  const id = `field-${name}`;
  const { input, read, fill } = control(schema, required);
  Object.assign(input, { id, name });
  const range = bounds(schema);
  const notes = [schema.description, range].filter(Boolean).join(" · ");
  const help = element("small", { id: `${id}-help` }, notes);
  input.setAttribute("aria-describedby", help.id);
  if (required && input.type !== "checkbox") input.setAttribute("aria-required", "true");
  const label = element("label", { htmlFor: id }, name, required ? null : element("small", {}, "optional"));
  const node = element("div", { className: `field ${input.type === "checkbox" ? "check" : ""} ${input.tagName === "TEXTAREA" ? "wide" : ""}` }, label, input, help);
  fill(schema.default ?? undefined);
  return {
    name, node, fill,
    read() {
      input.setCustomValidity("");
      const wrong = (message) => {
        input.setCustomValidity(message);
        throw Object.assign(new Error(`${name}: ${message}`), { input });
      };
      if (!input.checkValidity()) wrong(input.validationMessage);
      return read(wrong);
    },
  };
}

/** An input, how its value is read (undefined: left out), how one is put in. */
function control(schema, required) {
  if (schema.enum) {
    const select = element("select", { required });
    if (!required || schema.default === undefined) select.append(element("option", { value: "" }, required ? "choose…" : "–"));
    schema.enum.forEach((value, at) => select.append(element("option", { value: String(at) }, value === null ? "null" : String(value))));
    return {
      input: select,
      read: () => (select.value === "" ? undefined : schema.enum[Number(select.value)]),
      fill: (value) => { select.value = value === undefined ? "" : String(schema.enum.indexOf(value)); },
    };
  }
  if (schema.type === "boolean") {
    if (required || schema.default !== undefined) {
      const box = element("input", { type: "checkbox" });
      return { input: box, read: () => box.checked, fill: (value) => { box.checked = value === true; } };
    }
    return control({ ...schema, enum: [true, false] }, required);
  }
  if (schema.type === "integer" || schema.type === "number") {
    const whole = schema.type === "integer";
    const input = element("input", { type: "number", required, step: schema.multipleOf ?? (whole ? 1 : "any") });
    const { low, high } = limits(schema);
    if (low !== undefined) input.min = low;
    if (high !== undefined) input.max = high;
    return {
      input,
      read(wrong) {
        if (input.value === "") return undefined;
        const value = Number(input.value);
        if (value <= schema.exclusiveMinimum || value >= schema.exclusiveMaximum) wrong(bounds(schema));
        if (whole && !Number.isSafeInteger(value)) wrong("more digits than a browser's numbers have: use Raw");
        return value;
      },
      fill: (value) => { input.value = value ?? ""; },
    };
  }
  if (schema.type === "string") {
    const area = element("textarea", { rows: 1, spellcheck: false });
    if (schema.maxLength !== undefined) area.maxLength = schema.maxLength;
    area.dataset.enter = "sends";
    return {
      input: area,
      read(wrong) {
        if (area.value === "" && !required) return undefined;
        if (area.value.length < (schema.minLength ?? 0)) wrong(`at least ${schema.minLength} characters`);
        if (schema.pattern && !new RegExp(schema.pattern, "u").test(area.value)) wrong(`must match ${schema.pattern}`);
        return area.value;
      },
      fill: (value) => { area.value = value ?? ""; },
    };
  }
  const area = element("textarea", { rows: 2, spellcheck: false, placeholder: example(schema) });
  return {
    input: area,
    read(wrong) {
      if (area.value.trim() === "") return required ? wrong("JSON is needed") : undefined;
      try { return JSON.parse(area.value); } catch (error) { return wrong(`no JSON: ${error.message}`); }
    },
    fill: (value) => { area.value = value === undefined ? "" : JSON.stringify(value); },
  };
}

function limits({ type, minimum, maximum, exclusiveMinimum, exclusiveMaximum }) {
  if (type !== "integer") return { low: minimum ?? exclusiveMinimum, high: maximum ?? exclusiveMaximum };
  return {
    low: minimum ?? (exclusiveMinimum === undefined ? undefined : exclusiveMinimum + 1),
    high: maximum ?? (exclusiveMaximum === undefined ? undefined : exclusiveMaximum - 1),
  };
}

function bounds(schema) {
  const { low, high } = limits(schema);
  if (low !== undefined && high !== undefined) return `${low} to ${high}`;
  if (low !== undefined) return `from ${low}`;
  return high === undefined ? "" : `up to ${high}`;
}

function example(schema) {
  if (schema.type === "array") return "[…]";
  return schema.type === "object" ? "{…}" : "JSON";
}
