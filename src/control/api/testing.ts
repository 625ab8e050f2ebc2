// For tests of the APIs.
import type { TestServer } from "../testing.ts";

export interface Answer {
  status: number;
  type: string;
  headers: Headers;
  text: string;
  body: Record<string, unknown>;
}

/** The public listener, as a client with `key` sees it. */
export function client(server: TestServer, key?: string) {
  return async (
    method: string,
    path: string,
    body?: unknown,
    headers: Record<string, string> = {},
  ): Promise<Answer> => {
    const response = await fetch(`${server.url}${path}`, {
      method,
      headers: { ...(key !== undefined && { Authorization: `Bearer ${key}` }), ...headers },
      ...(body !== undefined && { body: typeof body === "string" ? body : JSON.stringify(body) }),
    });
    const text = await response.text();
    const type = response.headers.get("Content-Type") ?? "";
    const parsed = /\bjson\b|\+json/.test(type) ? JSON.parse(text) : {};
    return { status: response.status, type, headers: response.headers, text, body: parsed };
  };
}
