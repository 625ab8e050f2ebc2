// The listener for operators: Prometheus' metrics and the debug page (docs/control.md, "Metrics").
import { Hono } from "hono";
import { Registry } from "prom-client";
import { createDebug, type DebugPages } from "../control/debug.ts";
import type { Control } from "../control/index.ts";
import { addProcessMetrics } from "../control/metrics.ts";
import type { Relay } from "../relay/index.ts";
import type { ServerConfig } from "./config.ts";

/** `control` and `relay`: what runs in this process. */
export function createMetricsApp(config: ServerConfig, parts: { control?: Control; relay?: Relay }): Hono {
  const { control, relay } = parts;
  const registry = control?.metrics.registry ?? new Registry();
  if (!control) addProcessMetrics(registry);
  const app = new Hono();
  app.get("/metrics", async (c) =>
    c.body(`${await registry.metrics()}${relay ? relayMetrics(relay.stats()) : ""}`, 200, {
      "Content-Type": registry.contentType,
    }),
  );
  const pages: DebugPages = {
    ...control?.debugPages(),
    config: { title: "Configuration", read: () => ({ file: config.file, set: config.shown }) },
    ...(relay && { relay: { title: "Relay", read: () => relay.stats() } }),
  };
  app.route("/", createDebug(pages));
  return app;
}

/** The relay counts by the names of official relays, with labels in the name; here they get the prefix `derp_`. */
function relayMetrics(stats: Record<string, number>): string {
  const lines: string[] = [];
  const typed = new Set<string>();
  for (const [key, value] of Object.entries(stats)) {
    const name = `derp_${key.split("{", 1)[0]}`;
    const isGauge = /^derp_(gauge|average)_/.test(name);
    if (!typed.has(name)) lines.push(`# TYPE ${name} ${isGauge ? "gauge" : "counter"}`);
    typed.add(name);
    lines.push(`derp_${key} ${value}`);
  }
  return `${lines.join("\n")}\n`;
}
