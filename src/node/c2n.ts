// Requests from the control server to the node (spec/ts2021-control-protocol.md, section 21, "c2n"): a raw HTTP/1.1 request
// comes as the payload of a PingRequest, the raw HTTP/1.1 response goes back as a POST body. Only /echo is answered.

const MAX_REQUEST = 64 * 1024;

/** The raw response to a raw request. Never throws: what is no request gets a 400. */
export function answerC2N(request: Uint8Array): Uint8Array {
  const parsed = parseRequest(request);
  if (!parsed) return response(400, "Bad Request", "not an HTTP request");
  if (parsed.path === "/echo") return response(200, "OK", parsed.body);
  return response(400, "Bad Request", "unknown c2n path");
}

function parseRequest(bytes: Uint8Array): { path: string; body: Uint8Array } | null {
  if (bytes.length > MAX_REQUEST) return null;
  const end = Buffer.from(bytes).indexOf("\r\n\r\n");
  if (end < 0) return null;
  const [line = ""] = new TextDecoder("latin1").decode(bytes.subarray(0, end)).split("\r\n");
  const match = /^[A-Z]+ (\/[^ ?]*)(?:\?[^ ]*)? HTTP\/1\.[01]$/.exec(line);
  return match ? { path: match[1]!, body: bytes.subarray(end + 4) } : null;
}

function response(status: number, reason: string, body: string | Uint8Array): Uint8Array {
  const bytes = Buffer.from(body);
  const head = `HTTP/1.1 ${status} ${reason}\r\nContent-Length: ${bytes.length}\r\nConnection: close\r\n\r\n`;
  return Buffer.concat([Buffer.from(head), bytes]);
}
