// Random requests made from the OpenAPI documents alone, right and wrong ones: whatever is asked, the answer is the one that
// the document promises, or an error in its shape, and never a fault of the server.
import { expect, test } from "bun:test";
import fc from "fast-check";
import { z } from "zod";
import { makeSettings, TestServer } from "../testing.ts";

type Json = Record<string, unknown>;
interface Parameter {
  name: string;
  in: "path" | "query";
  required: boolean;
  schema: Json;
}
interface Operation {
  method: string;
  path: string;
  operationId: string;
  parameters: Parameter[];
  bodies: [type: string, schema: Json][];
  answers: Record<string, { content: Record<string, { schema: Json }> }>;
}
interface Document extends Json {
  servers: { url: string }[];
  paths: Record<string, Record<string, Json>>;
  components: { schemas: Json };
}

function operationsOf(document: Document): Operation[] {
  return Object.entries(document.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, entry]) => ({
      method: method.toUpperCase(),
      path: document.servers[0]!.url + path,
      operationId: entry.operationId as string,
      parameters: (entry.parameters ?? []) as Parameter[],
      bodies: Object.entries((entry.requestBody as Operation["answers"][string] | undefined)?.content ?? {}).map(
        ([type, { schema }]): [string, Json] => [type, schema],
      ),
      answers: entry.responses as Operation["answers"],
    })),
  );
}

/** The document's schema as a check. */
function checkOf(document: Document, schema: Json): z.ZodType {
  const text = JSON.stringify({ ...schema, $defs: document.components.schemas });
  return z.fromJSONSchema(JSON.parse(text.replaceAll("#/components/schemas/", "#/$defs/")));
}

const KNOWN_TEXTS = [
  ...["1", "2", "3", "4", "-", "0", "alice", "web", "tag:web", "10.0.0.0/8", "0.0.0.0/0", "client", "all", "true"],
  ...["devices:core", "users", "custom:a", "hskey-authreq-111111111111111111111111", "grant_type=client_credentials"],
  ...[
    '{"acls":[]}',
    '{"tagOwners":{"tag:web":[]}}',
    "",
    " ",
    "%",
    "\u0000",
    "é".repeat(50),
    "x".repeat(1200),
    "__proto__",
  ],
];
const someText = fc.oneof(fc.constantFrom(...KNOWN_TEXTS), fc.string(), fc.string({ unit: "binary", maxLength: 40 }));
const anything = fc.jsonValue({ maxDepth: 4 });

/** Values that the schema allows. */
function arbitraryOf(schema: Json): fc.Arbitrary<unknown> {
  const { examples, ...rest } = schema;
  if (examples)
    return fc.oneof(
      { arbitrary: fc.constantFrom(...(examples as unknown[])), weight: 4 },
      { arbitrary: arbitraryOf(rest), weight: 1 },
    );
  if (schema.anyOf) return fc.oneof(...(schema.anyOf as Json[]).map(arbitraryOf));
  if (schema.enum) return fc.constantFrom(...(schema.enum as unknown[]));
  if ("const" in schema) return fc.constant(schema.const);
  switch (schema.type) {
    case "object":
      return objectOf(schema);
    case "array":
      return fc.array(arbitraryOf(schema.items as Json), { maxLength: 5 });
    case "string":
      return textOf(schema);
    case "integer":
      return fc.integer({ min: Math.max(-1e12, Number(schema.minimum)), max: Math.min(1e12, Number(schema.maximum)) });
    case "number":
      return fc.double({ noNaN: true, noDefaultInfinity: true });
    case "boolean":
      return fc.boolean();
    case "null":
      return fc.constant(null);
    default:
      return anything;
  }
}

function objectOf(schema: Json): fc.Arbitrary<unknown> {
  const properties = Object.entries((schema.properties ?? {}) as Record<string, Json>);
  const known = fc.record(Object.fromEntries(properties.map(([name, inner]) => [name, arbitraryOf(inner)])), {
    requiredKeys: (schema.required ?? []) as string[],
  });
  const rest = schema.additionalProperties;
  if (typeof rest !== "object" || rest === null) return known;
  return fc.dictionary(someText, arbitraryOf(rest as Json), { maxKeys: 3 });
}

function textOf({ format, pattern, maxLength = 2000 }: { format?: string; pattern?: string; maxLength?: number }) {
  if (format === "date-time")
    return fc.date({ min: new Date(0), noInvalidDate: true }).map((date) => date.toISOString());
  if (pattern !== undefined) {
    const fitting = KNOWN_TEXTS.filter((text) => new RegExp(pattern).test(text));
    const any = fc.stringMatching(new RegExp(pattern));
    return fitting.length > 0 ? fc.oneof(fc.constantFrom(...fitting), any) : any;
  }
  return someText.map((text) => text.slice(0, maxLength));
}

interface Request {
  path: string;
  body: string | undefined;
}

/** `isWild`: parameters and body may be anything. */
function requestOf(operation: Operation, isWild: boolean): fc.Arbitrary<Request> {
  const parameter = (entry: Parameter) => {
    const value = isWild ? someText : arbitraryOf(entry.schema).map(String);
    return entry.required && !isWild ? value : fc.option(value, { nil: undefined });
  };
  const bodies = operation.bodies.map(([type, schema]) =>
    type === "application/json" ? arbitraryOf(schema).map((value) => JSON.stringify(value)) : someText,
  );
  const wild = fc.oneof(
    anything.map((value) => JSON.stringify(value)),
    someText,
  );
  const body = isWild ? wild : bodies.length > 0 ? fc.oneof(...bodies) : fc.constant(undefined);
  return fc.record({ values: fc.tuple(...operation.parameters.map(parameter)), body }).map(({ values, body }) => {
    const query = new URLSearchParams();
    let path = operation.path;
    for (const [i, { name, in: where }] of operation.parameters.entries()) {
      const text = values[i] as string | undefined;
      if (where === "path") path = path.replace(`{${name}}`, encodeURIComponent((text ?? "").toWellFormed()));
      else if (text !== undefined) query.set(name, text);
    }
    return { path: query.size > 0 ? `${path}?${query}` : path, body: operation.method === "GET" ? undefined : body };
  });
}

const RIGHT = 100;
const WILD = 40;

for (const base of ["/api/v1", "/api/v2"]) {
  test(`${base} keeps to its document, whatever it is asked`, async () => {
    await using server = await TestServer.start({ settings: makeSettings({ policy: { mode: "database", path: "" } }) });
    const key = await server.key({ user: await server.user("alice"), reusable: true });
    for (const name of ["web", "db", "cache"]) await server.join(name, key);
    const document = (await (await fetch(`${server.url}${base}/openapi.json`)).json()) as Document;
    const unix = server.control.adminSocket;
    let sent = 0;
    const succeeded = new Set<string>();
    for (const operation of operationsOf(document)) {
      const checks = {
        ok: checkOf(document, operation.answers["200"]!.content["application/json"]!.schema),
        error: checkOf(document, Object.values(operation.answers.default!.content)[0]!.schema),
      };
      const requests = [
        ...fc.sample(requestOf(operation, false), { numRuns: RIGHT, seed: 20_261_121 }),
        ...fc.sample(requestOf(operation, true), { numRuns: WILD, seed: 5 }),
      ];
      const ask = async ({ path, body }: Request) => {
        const response = await fetch(`http://weft${path}`, { unix, method: operation.method, ...(body && { body }) });
        const text = await response.text();
        const what = {
          operation: operation.operationId,
          path,
          body,
          status: response.status,
          text: text.slice(0, 500),
        };
        sent++;
        // A path without a needed part is another operation, or none.
        if (path.includes("//") || /\/(\?|$)/.test(path)) return;
        if (!/^application\/(problem\+)?json/.test(response.headers.get("Content-Type") ?? "")) {
          expect({ ...what, isText: response.ok }).toEqual({ ...what, isText: true });
          return;
        }
        const isRight =
          response.status === 200 || response.status === 501 || (response.status >= 400 && response.status < 500);
        expect({ ...what, isRight }).toEqual({ ...what, isRight: true });
        if (response.ok) succeeded.add(operation.operationId);
        const parsed = (response.ok ? checks.ok : checks.error).safeParse(JSON.parse(text));
        expect({ ...what, problem: parsed.error?.message }).toEqual({ ...what, problem: undefined });
      };
      for (let at = 0; at < requests.length; at += 20) await Promise.all(requests.slice(at, at + 20).map(ask));
    }
    expect(sent).toBeGreaterThan(3000);
    // The requests reach into the operations, not only their checks.
    expect(succeeded.size).toBeGreaterThan(operationsOf(document).length / 2);
    expect((await fetch(`${server.url}/health`)).status).toBe(200);
  }, 120_000);
}

test("bodies of a MiB, of depth 10,000 and of the wrong kind make no operation fault, and others are served meanwhile", async () => {
  await using server = await TestServer.start({ settings: makeSettings({ policy: { mode: "database", path: "" } }) });
  const { apiKey } = await server.admin<{ apiKey: string }>("POST", "/apikey", {});
  await server.join("web", await server.key({ user: await server.user("alice") }));
  const deep = (open: string, close: string) => open.repeat(10_000) + close.repeat(10_000);
  const wide = (piece: string) =>
    Array.from({ length: Math.floor(1_000_000 / (piece.length + 1)) }, () => piece).join(",");
  const bodies = [
    deep("[", "]"),
    deep('{"a":', "}").replace(/:(})/, ":1$1"),
    `{"routes":[${wide('"10.0.0.0/8"')}],"tags":[${wide('"tag:a"')}]}`.slice(0, 1_048_576),
    `{"tags":[${wide('"tag:a"')}]}`,
    `{"routes":[${wide('"10.0.0.0/8"')}]}`,
    `{"policy":"${"[".repeat(1_000_000)}"}`,
    `{"name":"${"x".repeat(1_000_000)}","user":"${"1".repeat(1000)}"}`,
    `{${Array.from({ length: 60_000 }, (_, i) => `"k${i}":[]`).join(",")}}`,
    `"${"\\u0000".repeat(170_000)}"`,
    "1e999",
    "null",
    "x".repeat(1_048_577),
  ];
  const faults: unknown[] = [];
  let served = 0;
  for (const base of ["/api/v1", "/api/v2"]) {
    const document = (await (await fetch(`${server.url}${base}/openapi.json`)).json()) as Document;
    for (const operation of operationsOf(document).filter(({ bodies }) => bodies.length > 0)) {
      const path = operation.path.replace("{tailnet}", "-").replaceAll(/\{\w+\}/g, "1");
      for (const body of bodies) {
        const headers = { Authorization: `Bearer ${apiKey}` };
        const [answer, health] = await Promise.all([
          fetch(server.url + path, { method: operation.method, headers, body }),
          fetch(`${server.url}/health`),
        ]);
        await answer.text();
        served += Number(health.status === 200);
        if (answer.status >= 500 && answer.status !== 501)
          faults.push({ operation: operation.operationId, status: answer.status, body: body.slice(0, 40) });
      }
    }
  }
  expect(faults).toEqual([]);
  expect(served).toBeGreaterThan(200);
}, 120_000);
