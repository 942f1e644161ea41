/** The server's OpenAI API: models, and answers as they are written. */

/** What the server said to a refused request, or why none came. status 0: no answer at all. wait_s: as Retry-After says. */
export class ApiError extends Error {
  constructor(message, status = 0, wait_s = 0) {
    super(message);
    this.status = status;
    this.wait_s = wait_s;
  }
}

async function request(path, key, options = {}) {
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers }).catch((e) => {
    if (e.name === "AbortError") throw e;
    throw new ApiError("The server does not answer. Is it running?");
  });
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  const message = said?.error?.message ?? `The server answered ${response.status} ${response.statusText}`;
  throw new ApiError(String(message), response.status, Number(response.headers.get("Retry-After")) || 0);
}

/** -> the models, as /v1/models lists them. */
export async function models(key) {
  return (await (await request("v1/models", key)).json()).data;
}

/** Yields the chunks of a streamed chat completion. ApiError where the server reports one, or stops before [DONE]. */
export async function* chat(body, key, signal) {
  const stream = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await request("v1/chat/completions", key, { method: "POST", body: JSON.stringify(stream), signal });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(String(chunk.error.message ?? "The server failed"), 500);
    yield chunk;
  }
  throw new ApiError("The connection ended before the answer did.");
}

/** The data of server-sent events. Pieces may end anywhere, inside a character too. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read().catch((e) => {
        if (e.name === "AbortError") throw e;
        throw new ApiError("The connection broke.");
      });
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        else if (!line && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
