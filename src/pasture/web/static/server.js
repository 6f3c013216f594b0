// Talking to the server: the visitor's key, requests, and server-sent events over fetch (EventSource cannot send a key).
// All paths are relative, so the pages work behind a proxy that puts them in a folder. Keys live as long as the tab.

/** A kept key: "api" opens the chat, "admin" the numbers where a server has one. */
export const key = (kind) => sessionStorage.getItem(`pasture-${kind}`) ?? "";

export const setKey = (kind, value) =>
  value ? sessionStorage.setItem(`pasture-${kind}`, value) : sessionStorage.removeItem(`pasture-${kind}`);

/** The key that a route asks for, else the other one: a server may have one of them only. */
const keyFor = (path) => (/^v1\/(live|admin)/.test(path) ? key("admin") || key("api") : key("api"));

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** A response that went well. Throws Refused with the server's own words otherwise. */
export async function ask(path, { body, signal } = {}) {
  const mine = keyFor(path);
  const headers = mine ? { authorization: `Bearer ${mine}` } : {};
  if (body !== undefined) headers["content-type"] = "application/json";
  const response = await fetch(path, {
    method: body === undefined ? "GET" : "POST",
    headers,
    body: body === undefined ? undefined : JSON.stringify(body),
    signal,
    cache: "no-store",
  });
  if (response.ok) return response;
  const problem = await response.json().catch(() => null);
  throw new Refused(response.status, problem?.error?.message ?? `the server answered ${response.status}`);
}

/** The data of each event, parsed; the end mark `[DONE]` is left out. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

/**
 * Calls `onSnapshot` about twice a second for as long as the page is looked at, `onState` with what keeps it from doing so.
 * Ends where there are no numbers: they are on the server's admin port then.
 */
export async function follow(onSnapshot, onState) {
  for (let wait = 500; ; wait = Math.min(wait * 2, 8000)) {
    try {
      await visible();
      const leaving = new AbortController();
      const hide = () => document.hidden && leaving.abort();
      document.addEventListener("visibilitychange", hide);
      try {
        for await (const snapshot of events(await ask("v1/live", { signal: leaving.signal }))) {
          wait = 500;
          onSnapshot(snapshot);
        }
      } finally {
        document.removeEventListener("visibilitychange", hide);
      }
      onState("ended");
    } catch (error) {
      if (error.name === "AbortError") continue;
      if (error.status === 404) return onState("elsewhere");
      onState(error.status === 401 ? "locked" : "lost");
      if (error.status === 401) await keyChanged();
    }
    await new Promise((resolve) => setTimeout(resolve, wait));
  }
}

const visible = () =>
  new Promise((resolve) => {
    if (!document.hidden) return resolve();
    document.addEventListener("visibilitychange", () => document.hidden || resolve(), { once: true });
  });

const waiting = [];
const keyChanged = () => new Promise((resolve) => waiting.push(resolve));
export const announceKey = () => waiting.splice(0).forEach((resolve) => resolve());
