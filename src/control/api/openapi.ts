// The OpenAPI 3.1 document of an API, from the same descriptions and schemas that check its requests: JSON Schema 2020-12 is
// what zod gives and what OpenAPI 3.1 takes.
import { z } from "zod";
import type { Operation } from "./operation.ts";

export interface ApiDescription {
  title: string;
  description: string;
  version: string;
  base: string;
  operations: readonly Operation[];
  /** Shape of errors, and its media type. */
  error: { schema: z.ZodType; type: string };
  securitySchemes: Record<string, unknown>;
}

type Json = Record<string, unknown>;

export function openApiDocument(api: ApiDescription): Json {
  const schemas: Json = {};
  /** The schema, with those that have a name moved to the components. */
  const place = (schema: z.ZodType, io: "input" | "output"): Json => {
    const { $schema, $defs, ...own } = z.toJSONSchema(schema, { io, unrepresentable: "any" }) as Json & {
      $defs?: Json;
    };
    for (const [name, definition] of Object.entries($defs ?? {})) schemas[name] = refer(definition);
    // A schema that has a name itself comes inlined.
    const name = io === "output" ? (own.id as string | undefined) : undefined;
    if (name === undefined) return refer(own) as Json;
    const { id, ...named } = own;
    schemas[name] = refer(named);
    return { $ref: `#/components/schemas/${name}` };
  };
  const error = { [api.error.type]: { schema: place(api.error.schema, "output") } };
  const paths: Record<string, Json> = {};
  for (const operation of api.operations) {
    const parameters = [
      ...parametersOf(operation.params, "path", place),
      ...parametersOf(operation.query, "query", place),
    ];
    const answer: Json = { "application/json": { schema: place(operation.response, "output") } };
    for (const type of operation.textResponse ?? []) answer[type] = { schema: { type: "string" } };
    const entry: Json = {
      operationId: operation.id,
      tags: [operation.tag],
      summary: operation.summary,
      ...(operation.anonymous && { security: [] }),
      ...(operation.scope && { description: `OAuth tokens need the scope \`${operation.scope}\`.` }),
      ...(parameters.length > 0 && { parameters }),
      ...(operation.body && { requestBody: requestBody(operation, place) }),
      responses: {
        "200": { description: "OK", content: answer },
        default: { description: "It was not done; the body says why.", content: error },
      },
    };
    paths[operation.path] = { ...paths[operation.path], [operation.method]: entry };
  }
  return {
    openapi: "3.1.0",
    info: { title: api.title, description: api.description, version: api.version },
    servers: [{ url: api.base }],
    security: Object.keys(api.securitySchemes).map((name) => ({ [name]: [] })),
    paths,
    components: { schemas, securitySchemes: api.securitySchemes },
  };
}

type Place = (schema: z.ZodType, io: "input" | "output") => Json;

function requestBody({ body, textBody }: Operation, place: Place): Json {
  if (textBody) return { content: Object.fromEntries(textBody.map((type) => [type, { schema: { type: "string" } }])) };
  return { content: { "application/json": { schema: place(body!, "input") } } };
}

function parametersOf(schema: z.ZodObject | undefined, where: "path" | "query", place: Place): Json[] {
  if (!schema) return [];
  const { properties = {}, required = [] } = place(schema, "input") as {
    properties?: Record<string, Json>;
    required?: string[];
  };
  return Object.entries(properties).map(([name, { description, ...property }]) => ({
    name,
    in: where,
    required: required.includes(name),
    ...(description !== undefined && { description }),
    schema: property,
  }));
}

function refer(value: unknown): unknown {
  if (Array.isArray(value)) return value.map(refer);
  if (typeof value !== "object" || value === null) return value;
  return Object.fromEntries(
    Object.entries(value)
      .filter(([key, inner]) => !(key === "id" && typeof inner === "string"))
      .map(([key, inner]) => [
        key,
        key === "$ref" && typeof inner === "string" ? inner.replace("#/$defs/", "#/components/schemas/") : refer(inner),
      ]),
  );
}
