// The socket at /ws: one answer for each request, in order. And what HTTP says about the environment.

/** An error that the server told, or the loss of the connection. */
export class WireError extends Error {
  constructor(code, message, data = {}) {
    super(message);
    this.code = code;
    this.data = data;
  }
}

// Relative to the page, so that a server behind a path prefix works too.
const address = (path) => new URL(path, location.href.replace(/[?#].*$/, ""));

async function http(path, options = {}) {
  const response = await fetch(address(path), { ...options, cache: "no-store" });
  if (!response.ok) throw new WireError(response.status, `${path}: HTTP ${response.status}`);
  return response.json();
}

export const getJSON = (path) => http(path);
export const postJSON = (path, body) =>
  http(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

/**
 * Trade the server's token for its cookie, which sockets bring too; false if it is a wrong one.
 * It goes in a header: addresses stay in histories and logs.
 */
export async function enter(token) {
  const response = await fetch(address("web"), { method: "POST", headers: { Authorization: `Bearer ${token}` }, cache: "no-store" });
  if (!response.ok && response.status !== 401) throw new WireError(response.status, `the token: HTTP ${response.status}`);
  return response.ok;
}

/** One session: it lives as long as its socket. */
export class Session {
  #socket;
  #waiting = [];
  #last = null;

  /** @param {(reason: WireError) => void} lost told when the socket closes, whoever closed it. */
  constructor(lost) {
    this.lost = lost;
  }

  open() {
    const url = address("ws");
    url.protocol = url.protocol.replace("http", "ws");
    return new Promise((resolve, reject) => {
      const socket = new WebSocket(url);
      this.#socket = socket;
      socket.onopen = () => resolve(this);
      socket.onmessage = ({ data }) => this.#answer(JSON.parse(data));
      socket.onclose = ({ code, reason }) => {
        const error = this.#last ?? new WireError("CLOSED", `the connection is closed (${[code, reason].filter(Boolean).join(" ")})`);
        reject(error);
        for (const request of this.#waiting.splice(0)) request.reject(error);
        this.lost(error);
      };
    });
  }

  request(frame) {
    return new Promise((resolve, reject) => {
      if (this.#socket.readyState !== WebSocket.OPEN) return reject(new WireError("CLOSED", "the connection is closed"));
      this.#waiting.push({ resolve, reject });
      this.#socket.send(JSON.stringify(frame));
    });
  }

  close() {
    if (this.#socket.readyState === WebSocket.OPEN) this.#socket.send('{"type":"close"}');
    this.#socket.close();
  }

  #answer(frame) {
    const request = this.#waiting.shift();
    if (frame.type === "error") {
      const { message = "error", code = "UNKNOWN", ...rest } = frame.data ?? {};
      const error = new WireError(code, message, rest);
      if (request) request.reject(error);
      else this.#last = error; // Why it is about to close: no room, no environment.
    } else request?.resolve(frame.data);
  }
}
