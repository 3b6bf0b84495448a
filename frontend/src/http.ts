/** Requests to the server's HTTP API, relative to the page, so that the page also works under a sub-path. */

/** Why a request failed: the server's error code, or "connection_lost". */
export class RequestError extends Error {
  readonly code: string;

  constructor(code: string) {
    super(code);
    this.code = code;
  }
}

/** What is asked again when it fails may not hang: not longer than a large chat takes over a slow line. */
const LONGEST_READ_SECONDS = 60;

/** The JSON reply of the server. Throws a `RequestError`. */
export async function request<T>(method: string, path: string, body?: unknown, seconds?: number): Promise<T> {
  if (method === "GET") seconds ??= LONGEST_READ_SECONDS;
  let response: Response;
  try {
    response = await fetch(path, {
      method,
      // A browser that is too old for it waits as long as it takes.
      signal: seconds === undefined ? null : (AbortSignal.timeout?.(seconds * 1000) ?? null),
      ...(body === undefined ? {} : { body: JSON.stringify(body), headers: { "Content-Type": "application/json" } }),
    });
  } catch {
    throw new RequestError("connection_lost");
  }
  if (!response.ok) throw new RequestError(await codeOf(response));
  if (response.status === 204) return undefined as T;
  try {
    return (await response.json()) as T;
  } catch {
    throw new RequestError("connection_lost");
  }
}

async function codeOf(response: Response): Promise<string> {
  try {
    const { code } = (await response.json()) as { code?: unknown };
    if (typeof code === "string") return code;
  } catch {
    // a proxy's own page
  }
  if (response.status === 413) return "message_too_large";
  return response.status >= 502 ? "connection_lost" : "internal_error";
}
