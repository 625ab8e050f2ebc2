// Questions to a node over its map stream: whether it answers, how it reaches another one, and requests to its client (C2N).
import { z } from "zod";
import type { ControlContext } from "../context.ts";
import { type Operation, operation } from "./operation.ts";
import { idParam, text } from "./shapes.ts";

/** Milliseconds that a node has to answer; a ping of a peer may take the client ten seconds. */
const ANSWER = 5_000;
const PING = 12_000;
const C2N = 30_000;

export function pings({ pings }: ControlContext): Operation[] {
  return [
    operation({
      method: "post",
      path: "/node/{id}/ping",
      id: "pingNode",
      asks: true,
      tag: "Nodes",
      summary: "Ask a node whether it is there; with an address, how it reaches that",
      params: idParam,
      body: z.object({ ip: text.optional(), type: z.enum(["disco", "TSMP", "ICMP", "peerapi"]).optional() }),
      response: z.object({
        latencySeconds: z.number().nullable(),
        error: z.string(),
        endpoint: z.string(),
        derpRegion: z.string(),
      }),
      async handle({ params, body }) {
        if (body.ip === undefined) {
          const latencySeconds = (await pings.head(params.id, ANSWER)) / 1000;
          return { latencySeconds, error: "", endpoint: "", derpRegion: "" };
        }
        const found = await pings.ping(params.id, body.type ?? "disco", body.ip, PING);
        return {
          latencySeconds: typeof found.LatencySeconds === "number" ? found.LatencySeconds : null,
          error: String(found.Err ?? ""),
          endpoint: String(found.Endpoint ?? ""),
          derpRegion: String(found.DERPRegionCode ?? ""),
        };
      },
    }),
    operation({
      method: "post",
      path: "/node/{id}/c2n",
      id: "requestNode",
      tag: "Nodes",
      summary: "Send an HTTP request to the node's client itself, for example GET /debug/health",
      params: idParam,
      body: z.object({
        method: z.enum(["GET", "POST"]).optional(),
        path: text,
        body: z.string().max(65_536).optional(),
      }),
      response: z.object({ status: z.number(), body: z.string() }),
      async handle({ params, body: { method, path, body } }) {
        const request = { method: method ?? "GET", path, ...(body !== undefined && { body: Buffer.from(body) }) };
        const answer = await pings.c2n(params.id, request, C2N);
        return { status: answer.status, body: Buffer.from(answer.body).toString() };
      },
    }),
  ];
}
