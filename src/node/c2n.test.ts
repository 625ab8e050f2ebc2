import { expect, test } from "bun:test";
import fc from "fast-check";
import { answerC2N } from "./c2n.ts";

const ask = (text: string) => Buffer.from(answerC2N(Buffer.from(text))).toString();

test("echo gives the body back, unknown paths and what is no request get 400", () => {
  expect(ask("POST /echo HTTP/1.1\r\nHost: x\r\n\r\nhello")).toBe(
    "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello",
  );
  expect(ask("GET /echo?x=1 HTTP/1.1\r\n\r\n")).toStartWith("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n");
  expect(ask("GET /debug/prefs HTTP/1.1\r\n\r\n")).toEndWith("\r\n\r\nunknown c2n path");
  for (const text of ["", "GET /echo HTTP/1.1\r\n", "hello\r\n\r\n", `GET /echo HTTP/1.1\r\n\r\n${"x".repeat(70_000)}`])
    expect(ask(text)).toStartWith("HTTP/1.1 400 Bad Request\r\n");
});

test("any bytes get an HTTP response", () => {
  fc.assert(
    fc.property(fc.uint8Array({ maxLength: 200 }), (bytes) => {
      expect(Buffer.from(answerC2N(bytes)).toString("latin1")).toMatch(/^HTTP\/1\.1 (200|400) /);
    }),
  );
});
