// One episode at a time, by hand: what is typed becomes an action at /ws, what comes back the transcript.

import { constants, form, variants } from "./page_form.js";
import { call, chip, content, element, entry, imageOf, json, picture, rewardChip, short, signed, text } from "./page_view.js";
import { Session, WireError, enter, getJSON, postJSON } from "./page_wire.js";

const $ = (id) => document.getElementById(id);

let about = {};
let ours = null; // What /metadata says of a Turnwise environment; null for one that was written for OpenEnv.
let choices = []; // {label, title, form, build(values), clears?}
let chosen = 0;
let session = null;
const task = { path: "", counts: {} };
let busy = false;
let episode = null; // {started, steps: [{action, answer, ms}], messages, reward, done}

// -- start -------------------------------------------------------------------------------------------

async function start() {
  try {
    about = await getJSON("metadata").catch(async (error) => {
      if (error.code !== 401) throw error;
      await askToken();
      return getJSON("metadata");
    });
  } catch (error) {
    return error.code === 401 ? alert(...noCookie()) : alert(error.message);
  }
  ours = about.turnwise ?? null;
  $("name").textContent = about.name ?? "environment";
  $("description").textContent = about.description ?? "";
  document.title = `${about.name ?? "environment"} · Turnwise`;
  const schema = await getJSON("schema").catch(() => ({}));
  const tools = ours ? ours.tools : await foreignTools();
  choices = [...tools.map(toolChoice), ...otherChoices(schema.action ?? {}, tools)];
  await askTasks();
  drawChoices();
  restore();
  unlock();
}

async function foreignTools() {
  try {
    const { result } = await postJSON("mcp", { jsonrpc: "2.0", id: 1, method: "tools/list", params: {} });
    return (result?.tools ?? []).map(({ name, description, input_schema, inputSchema }) => ({
      name, description, parameters: input_schema ?? inputSchema ?? {},
    }));
  } catch {
    return []; // It has no tools, or speaks no MCP.
  }
}

function toolChoice({ name, description, parameters }) {
  return {
    label: name, title: description, form: form(parameters),
    build: (values) => ({ type: "call_tool", tool_name: name, arguments: values }),
  };
}

function otherChoices(schema, tools) {
  const found = [];
  const reply = { properties: { text: { type: "string" } }, required: ["text"] };
  if (ours) {
    const title = ours.has_step ? "Say something." : "A reply that calls no tool ends this episode.";
    found.push({ label: "Reply", title, form: form(reply), clears: true, build: ({ text }) => ({ type: "reply", text }) });
  } else {
    for (const variant of variants(schema)) {
      const { type } = constants(variant);
      const isCall = "tool_name" in variant.properties || type === "list_tools" || type === "call_tool";
      // A bare Action is anything at all: Raw says it better.
      const drawn = form(variant, { skip: ["metadata"] });
      if (isCall && tools.length) continue;
      if (drawn.fields.length) found.push({ label: type ?? variant.title ?? "Action", title: variant.description, form: drawn, build: (values) => values });
    }
  }
  const raw = form({ properties: { action: { type: "object", description: "the action as it goes to the server" } }, required: ["action"] });
  raw.fill({ action: ours ? { type: "reply", text: "" } : tools.length ? { type: "list_tools" } : {} });
  found.push({ label: "Raw", title: "Any action, as JSON.", form: raw, build: ({ action }) => action });
  return found;
}

/** Splits and their sizes, where it has the Task API. */
async function askTasks() {
  try {
    const [name] = await getJSON("list_environments");
    if (name === undefined) return; // It has no tasks.
    task.path = encodeURIComponent(name);
    for (const split of await getJSON(`${task.path}/splits`)) {
      const { num_tasks: count } = await postJSON(`${task.path}/num_tasks`, { split: split.name });
      task.counts[split.name] = count;
      $("split").append(element("option", { value: split.name }, split.name));
    }
    $("split-field").hidden = false;
  } catch (error) {
    if (!(error instanceof WireError)) throw error; // A server without the Task API.
  }
}

/** Until it is the right one. */
async function askToken() {
  const dialog = $("token-dialog");
  for (;;) {
    dialog.showModal();
    await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
    if (await enter($("token").value)) return;
    $("token-why").textContent = "That token was refused. It is what the server was started with.";
  }
}

/** What to do where the token was right and the browser does not keep its cookie. */
function noCookie() {
  if (window === window.top) return ["The token is right, but this browser keeps no cookies, which the page needs."];
  const tab = element("a", { href: location.href, target: "_blank", rel: "noopener" }, "Open it in its own tab");
  return ["The token is right, but the browser keeps no cookie for a page inside of another site. ", tab];
}

/** What the address asks for: `?split=train&index=3&seed=7`. */
function restore() {
  const asked = new URLSearchParams(location.search);
  for (const name of ["split", "index", "seed"]) if (asked.has(name)) $(name).value = asked.get(name);
  drawTask();
}

function drawTask() {
  const split = $("split").value;
  $("index-field").hidden = !split;
  $("rows").textContent = split ? `of ${task.counts[split]}` : "";
  $("index").max = split ? task.counts[split] - 1 : "";
}

// -- the episode -------------------------------------------------------------------------------------

async function reset() {
  const data = readReset();
  if (data === null) return;
  await waiting(async () => {
    if (!session) await connect();
    const begun = performance.now();
    const answer = await session.request({ type: "reset", data });
    episode = { reset: data, answer, ms: performance.now() - begun, steps: [], messages: [], reward: 0, done: false };
    history.replaceState(null, "", `?${new URLSearchParams(Object.entries(data).filter(([, value]) => typeof value !== "object"))}`);
    $("transcript").replaceChildren();
    if (ours?.system) show({ who: "system", kind: "system", parts: [text(ours.system)] });
    if (ours?.system) episode.messages.push({ role: "system", content: ours.system });
    showAnswer(answer, "environment", episode.ms);
    await refresh();
  });
  focusField();
}

function readReset() {
  const data = {};
  const fail = (input, message) => {
    input.setCustomValidity(message);
    input.reportValidity();
    input.addEventListener("input", () => input.setCustomValidity(""), { once: true });
    return null;
  };
  if ($("seed").value !== "") data.seed = Number($("seed").value);
  if (!$("index-field").hidden) {
    data.split = $("split").value;
    data.index = Number($("index").value);
  }
  if ($("extra").value.trim() === "") return data;
  try {
    const extra = JSON.parse($("extra").value);
    if (extra === null || typeof extra !== "object" || Array.isArray(extra)) return fail($("extra"), "a JSON object is needed");
    return { ...data, ...extra };
  } catch (error) {
    return fail($("extra"), `no JSON: ${error.message}`);
  }
}

async function act() {
  const choice = choices[chosen];
  let action;
  try {
    action = choice.build(choice.form.read());
  } catch (error) {
    if (!error.input) throw error;
    error.input.reportValidity();
    error.input.addEventListener("input", () => error.input.setCustomValidity(""), { once: true });
    return;
  }
  await waiting(async () => {
    showAction(action, choice.label);
    const begun = performance.now();
    const answer = await session.request({ type: "step", data: action });
    const ms = performance.now() - begun;
    episode.steps.push({ action, answer, ms: Math.round(ms * 10) / 10 });
    episode.reward += answer.reward ?? 0;
    episode.done = answer.done === true;
    remember(action, answer);
    showAnswer(answer, action.type === "call_tool" ? action.tool_name : "environment", ms);
    if (choice.clears) choice.form.fill({});
    await refresh();
  });
  focusField();
}

/** The messages so far, as a teacher is shown them. */
function remember(action, { observation }) {
  if (!ours) return;
  const id = `call_${episode.steps.length}`;
  if (action.type === "call_tool") {
    episode.messages.push(
      { role: "assistant", content: "", tool_calls: [{ id, type: "function", function: { name: action.tool_name, arguments: action.arguments ?? {} } }] },
      { role: "tool", tool_call_id: id, name: action.tool_name, content: observation.error?.message ?? observation.result ?? "" },
    );
  } else if (action.type !== "list_tools") {
    episode.messages.push({ role: "assistant", content: action.text ?? action.message ?? "" }, ...(observation.messages ?? []));
  }
}

async function askTeacher() {
  await waiting(async () => {
    const { content: said, tool_calls: calls = [] } = await session.request({
      type: "turnwise", data: { method: "teacher", messages: episode.messages },
    });
    const at = choices.findIndex(({ label }) => label === (calls[0]?.function.name ?? "Reply"));
    if (at < 0) return;
    choose(at);
    choices[at].form.fill(calls.length ? calls[0].function.arguments : { text: said });
  });
  focusField();
}

async function connect() {
  status("connecting…");
  const opened = new Session((error) => {
    if (session !== opened) return;
    session = null;
    status("not connected");
    if (episode && !episode.done) {
      episode.done = true;
      show({ who: "connection", kind: "error", parts: [text(`${error.message}\nThe episode is lost. Start another.`)] });
    }
    unlock();
  });
  session = opened;
  try {
    await opened.open();
  } catch (error) {
    session = null;
    status("not connected");
    throw error;
  }
  status("connected", "on");
}

/** Nothing else may be asked for while something is; what goes wrong is told. */
async function waiting(work) {
  if (busy) return;
  busy = true;
  alert("");
  const begun = Date.now();
  const clock = setInterval(() => {
    const seconds = Math.round((Date.now() - begun) / 1000);
    if (seconds >= 1) status(`waiting ${seconds} s`, "on wait");
    $("leave").hidden = seconds < 3;
  }, 500);
  unlock();
  try {
    await work();
  } catch (error) {
    if (!(error instanceof WireError)) throw error;
    if (error.code === "CAPACITY_REACHED") alert(`No room: ${error.message} Try again in a moment.`);
    else if (!episode || error.code === "CLOSED") alert(error.message);
    else show({ who: error.code === "EXECUTION_ERROR" ? error.data.kind ?? "error" : "refused", kind: "error", parts: [text(error.message)], details: error.data.errors ? [["where", error.data.errors]] : [] });
  } finally {
    clearInterval(clock);
    busy = false;
    status(session ? "connected" : "not connected", session ? "on" : "");
    unlock();
  }
}

// -- what is seen ------------------------------------------------------------------------------------

function show(what) {
  const list = $("transcript");
  list.append(entry(what));
  // Down to the newest, but not past one's own last action.
  const from = [...list.querySelectorAll(".entry.you")].at(-1) ?? list.lastElementChild;
  list.scrollTop = from.offsetTop - list.offsetTop;
}

function showAction(action, label) {
  const said = action.type === "reply" || (ours && action.type === undefined) ? action.text ?? action.message : undefined;
  const part = action.type === "call_tool" ? call(action.tool_name, action.arguments ?? {})
    : typeof said === "string" ? text(said)
    : label === "Raw" ? json(action) : call(label, action);
  show({ who: "you", kind: "you", parts: [part] });
}

function showAnswer(answer, who, ms) {
  const { observation = {}, metadata = {} } = answer;
  const notes = [element("small", {}, `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`)];
  if (typeof answer.reward === "number" || typeof answer.reward === "boolean") notes.push(rewardChip(Number(answer.reward)));
  if (metadata.coerced) notes.push(chip("read as text"));
  const details = metadata.info && Object.keys(metadata.info).length ? [["info", metadata.info]] : [];
  show({ who, kind: observation.error ? "error" : "environment", parts: seen(answer), notes, details });
  if (answer.done) showEnd(answer);
}

/** An observation's parts: messages, a tool's result, or fields. */
function seen({ observation = {}, metadata = {} }) {
  const { messages, tool_name: tool, result, error } = observation;
  if (Array.isArray(messages) && ours) {
    episode.messages.push(...(episode.steps.length ? [] : messages));
    return messages.flatMap((one) => content(one.content));
  }
  if (tool !== undefined) {
    if (error) return [text(error.message ?? JSON.stringify(error))];
    if (metadata.content) return content(metadata.content);
    const found = result?.structured_content?.result ?? result?.data ?? result?.content ?? result;
    return content(found).length ? content(found) : [text("nothing")];
  }
  const fields = Object.entries(observation);
  if (fields.length === 1 && typeof fields[0][1] === "string" && !imageOf(fields[0][1])) return [text(fields[0][1])];
  const images = fields.filter(([, value]) => imageOf(value));
  const pages = fields.filter(([, value]) => typeof value === "string" && value.includes("\n") && !imageOf(value));
  const rest = fields.filter((field) => !images.includes(field) && !pages.includes(field));
  return [
    ...images.map(([, value]) => picture(imageOf(value))),
    ...pages.map(([key, value]) => element("div", { className: "page" }, element("small", {}, key), text(value))),
    ...(rest.length || !fields.length ? [json(Object.fromEntries(rest))] : []),
  ];
}

function showEnd({ metadata = {} }) {
  const how = metadata.truncated ? "truncated" : metadata.terminated ? "terminated" : "done";
  const named = Object.entries(metadata.rewards ?? {});
  const parts = [element("p", {}, `The episode is over, ${how}, with a reward of ${short(episode.reward)}.`)];
  if (metadata.scoring_error) parts.push(text(metadata.scoring_error));
  show({ who: "end", kind: "end", parts, notes: named.map(([name, value]) => chip(`${name} ${value === null ? "–" : signed(value)}`)) });
}

async function refresh() {
  const found = await session.request({ type: "state" });
  $("state").replaceChildren(json(found));
  drawScore();
}

function drawScore() {
  const rewards = episode.steps.map(({ answer }) => Number(answer.reward ?? 0));
  $("total").textContent = short(episode.reward);
  $("total").className = episode.reward > 0 ? "good" : episode.reward < 0 ? "bad" : "";
  const limit = ours?.limits.max_turns ? ` of ${ours.limits.max_turns}` : "";
  $("progress").textContent = `${episode.done ? "over after" : "step"} ${episode.steps.length}${limit}`;
  const most = Math.max(...rewards.map(Math.abs), 1e-9);
  const last = rewards.some(Boolean) ? rewards.slice(-60) : [];
  $("bars").replaceChildren(...last.map((reward) => {
    const bar = element("i", { className: reward > 0 ? "good" : reward < 0 ? "bad" : "", title: signed(reward) });
    bar.style.height = `${Math.max(Math.abs(reward) / most * 100, 6)}%`;
    return bar;
  }));
}

function drawChoices() {
  $("choices").replaceChildren(...choices.map(({ label }, at) => element(
    "button",
    { type: "button", role: "tab", id: `choice-${at}`, "aria-controls": "action", onclick: () => { choose(at); focusField(); } },
    label,
  )));
  choose(0);
}

function choose(at) {
  chosen = at;
  [...$("choices").children].forEach((button, number) => {
    button.setAttribute("aria-selected", String(number === at));
    button.tabIndex = number === at ? 0 : -1;
  });
  const { title, form: drawn } = choices[at];
  $("about").textContent = title ?? "";
  $("fields").replaceChildren(...drawn.fields);
  unlock();
}

/** What may be done now. */
function unlock() {
  const playing = session !== null && episode !== null && !episode.done;
  $("reset").disabled = busy;
  $("reset").textContent = episode ? "Start again" : "Start";
  $("next").hidden = !episode;
  $("next").disabled = busy;
  $("send").disabled = busy || !playing;
  $("teacher").hidden = !ours?.teacher;
  $("teacher").disabled = busy || !playing;
  $("copy").disabled = !episode;
  $("leave").hidden &&= !busy;
  if (!busy) $("leave").hidden = true;
  const keys = matchMedia("(pointer: coarse)").matches ? "" : "Enter sends, Shift+Enter is a new line";
  $("hint").textContent = playing ? keys : episode ? "The episode is over." : "Start an episode first.";
  document.body.classList.toggle("over", episode !== null && !playing);
}

function focusField() {
  if ($("send").disabled) return $("reset").focus();
  ($("fields").querySelector("input, select, textarea") ?? $("send")).focus();
}

function status(label, className = "") {
  $("connection").className = className;
  $("connection").lastElementChild.textContent = label;
}

function alert(...parts) {
  $("alert").replaceChildren(...parts);
  $("alert").hidden = parts.join("") === "";
}

async function copy() {
  const record = {
    environment: about.name,
    reset: episode.reset,
    observation: episode.answer.observation,
    steps: episode.steps,
    reward: episode.reward,
    done: episode.done,
  };
  const written = JSON.stringify(record, null, 2);
  try {
    await navigator.clipboard.writeText(written);
  } catch {
    // Browsers give the clipboard to https and loopback only.
    const area = element("textarea", { value: written });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  $("copy").textContent = "Copied";
  setTimeout(() => { $("copy").textContent = "Copy as JSON"; }, 1500);
}

// -- keys and buttons --------------------------------------------------------------------------------

$("episode").addEventListener("submit", (event) => { event.preventDefault(); reset(); });
$("action").addEventListener("submit", (event) => { event.preventDefault(); if (!$("send").disabled) act(); });
$("next").addEventListener("click", () => {
  const field = $("index-field").hidden ? $("seed") : $("index");
  field.value = Number(field.value) + 1;
  reset();
});
$("teacher").addEventListener("click", askTeacher);
$("leave").addEventListener("click", () => session?.close());
$("copy").addEventListener("click", copy);
$("split").addEventListener("change", drawTask);
$("action").addEventListener("keydown", (event) => {
  const sends = (event.target.dataset.enter === "sends" && !event.shiftKey) || event.target.tagName === "SELECT";
  if (event.key === "Enter" && !event.isComposing && (sends || event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    $("action").requestSubmit();
  }
});
$("choices").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const at = event.key === "Home" ? 0 : event.key === "End" ? choices.length - 1 : chosen + (step ?? NaN);
  if (Number.isNaN(at)) return;
  event.preventDefault();
  choose((at + choices.length) % choices.length);
  $("choices").children[chosen].focus();
});

const THEME = "turnwise-theme";
// A page inside of another site may be denied storage: then a choice holds until it is closed.
const storage = (() => { try { return window.localStorage; } catch { return null; } })();
const paint = (theme) => { document.documentElement.dataset.theme = theme ?? ""; };
paint(storage?.getItem(THEME));
$("theme").addEventListener("click", () => {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const shown = document.documentElement.dataset.theme || (dark ? "dark" : "light");
  const next = shown === "dark" ? "light" : "dark";
  storage?.setItem(THEME, next);
  paint(next);
});

unlock();
start();
