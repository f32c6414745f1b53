// The calls of the gateway that serves this page. Addresses are relative, so a proxy may put it under any path.

let key = "";

/** The API key of the calls; it is kept here and nowhere else. */
export function useKey(given) {
  key = given.trim();
}

/** A response, or an Error whose message says why there is none. */
export async function call(path, body, signal) {
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  const options = { headers, signal, credentials: "omit", cache: "no-store" };
  if (body !== undefined) {
    options.method = "POST";
    options.body = JSON.stringify(body);
    headers["content-type"] = "application/json";
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The gateway does not answer.");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

/** The JSON of a response. */
export async function ask(path, body, signal) {
  return (await call(path, body, signal)).json();
}

async function refusal(response) {
  let message = `The gateway answered ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // Something before the gateway answered, and its body is no sentence for a person.
  }
  const after = response.headers.get("retry-after");
  const error = new Error(after ? `${message} (Try again in ${after} s.)` : message);
  error.status = response.status;
  return error;
}

/** The events of a stream, parsed, as they come. */
export async function* stream(path, body, signal) {
  const response = await call(path, body, signal);
  const decoder = new TextDecoder();
  const reader = response.body.getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The answer broke off.");
    rest += decoder.decode(value, { stream: true });
    const events = rest.split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.startsWith("data: ") ? event.slice(6) : "";
      if (data === "[DONE]") return;
      if (!data) continue;
      const parsed = JSON.parse(data);
      if (parsed.error) throw new Error(parsed.error.message);
      yield parsed;
    }
  }
}
