// What the control server counts, for Prometheus: Headscale's names where the meaning is the same, `weft_` for the rest.
// Counting is an addition to a plain number; the library is asked only when somebody reads. Labels have few values: never a
// node, a user or an address.
import { readdirSync } from "node:fs";
import type { MiddlewareHandler } from "hono";
import { Counter, Gauge, Histogram, Registry } from "prom-client";
import type { Change } from "./model.ts";

/** What went out on a map stream. */
export type MapMessage = "full" | "change" | "keepalive" | "ping";
/** Why a map stream ended: by its client, for a newer one of the same node, or by the server. */
export type MapEnd = "client" | "replaced" | "server";

export interface MetricsSources {
  /** Open Noise connections, requests in them, and map streams among those. */
  stats(): { connections: number; streams: number; maps: number };
  nodes(): { online: number; offline: number; expired: number; unauthorized: number };
  users(): number;
  pendingLogins(): number;
  /** Commands that are not written yet. */
  waiting(): number;
}

/** A counter with one label, whose values are plain numbers until somebody reads. */
class Tally<Label extends string> {
  private readonly counts = new Map<Label, { count: number }>();

  constructor(registry: Registry, name: string, help: string, label: string, more: Record<string, string> = {}) {
    const { counts } = this;
    const labelNames = [label, ...Object.keys(more)];
    new Counter({
      name,
      help,
      labelNames,
      registers: [registry],
      collect() {
        this.reset();
        for (const [value, { count }] of counts) this.inc({ [label]: value, ...more }, count);
      },
    });
  }

  add(label: Label, count = 1): void {
    const known = this.counts.get(label);
    if (known) known.count += count;
    else this.counts.set(label, { count });
  }
}

function addGauge(registry: Registry, name: string, help: string, read: () => number): void {
  new Gauge({
    name,
    help,
    registers: [registry],
    collect() {
      this.set(read());
    },
  });
}

/**
 * What every process tells Prometheus. The library's own set measures the event loop with a timer of 10 ms, by which an idle
 * server uses four times the processor.
 */
export function addProcessMetrics(registry: Registry): void {
  new Counter({
    name: "process_cpu_seconds_total",
    help: "User and system CPU time",
    registers: [registry],
    collect() {
      const { user, system } = process.cpuUsage();
      this.reset();
      this.inc((user + system) / 1e6);
    },
  });
  const started = Math.round(Date.now() / 1000 - process.uptime());
  addGauge(registry, "process_start_time_seconds", "Start of the process", () => started);
  addGauge(registry, "process_resident_memory_bytes", "Resident memory", () => process.memoryUsage.rss());
  addGauge(registry, "process_heap_bytes", "Used by the JavaScript heap", () => process.memoryUsage().heapUsed);
  addGauge(registry, "process_open_fds", "Open file descriptors", () => readdirSync("/proc/self/fd").length);
}

export class Metrics {
  readonly registry = new Registry();
  readonly mapSent: Tally<MapMessage>;
  /** Messages that were made for a client: what waits merges before that. */
  readonly mapGenerated: Tally<"full" | "change">;
  readonly mapEnded: Tally<MapEnd>;
  /** Records of nodes that commands put or took out. */
  readonly nodeOperations: Tally<"put" | "delete">;
  /** Small updates of nodes (endpoints, home relay, hostinfo). */
  readonly endpointUpdates: Tally<"ok">;
  readonly registrations: Tally<"ok" | "refused" | "waiting">;
  /** By what was guessed or wrong: "API key", "login id", "pre-auth key". */
  readonly loginFailures: Tally<string>;
  readonly machineRequests: Tally<"register" | "map" | "other">;
  private readonly journal: Histogram;
  private readonly batchSize: Histogram;
  private readonly http: Histogram<"route" | "status">;

  constructor(sources: MetricsSources) {
    const { registry } = this;
    const tally = <L extends string>(name: string, help: string, label: string, more?: Record<string, string>) =>
      new Tally<L>(registry, name, help, label, more);
    const gauge = (name: string, help: string, read: () => number) => addGauge(registry, name, help, read);
    addProcessMetrics(registry);
    this.mapSent = tally("headscale_mapresponse_sent_total", "Messages on map streams", "type", { status: "ok" });
    this.mapGenerated = tally("headscale_mapresponse_generated_total", "Messages made for clients", "response_type");
    this.mapEnded = tally("headscale_mapresponse_ended_total", "Map streams that ended", "reason");
    this.endpointUpdates = tally("headscale_mapresponse_endpoint_updates_total", "Small updates of nodes", "status");
    this.registrations = tally("weft_registrations_total", "Answers to register requests", "outcome");
    this.loginFailures = tally("weft_login_failures_total", "Wrong keys and login ids", "what");
    this.machineRequests = tally("weft_machine_requests_total", "Requests inside Noise", "endpoint");
    this.journal = new Histogram({
      name: "weft_journal_write_seconds",
      help: "One transaction of the store",
      buckets: [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 5],
      registers: [registry],
    });
    this.batchSize = new Histogram({
      name: "headscale_nodestore_batch_size",
      help: "Commands that one transaction of the store holds",
      buckets: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000],
      registers: [registry],
    });
    this.nodeOperations = tally("headscale_nodestore_operations_total", "Records of nodes written", "operation");
    gauge("headscale_nodestore_queue_depth", "Commands that wait to be written", () => sources.waiting());
    this.http = new Histogram({
      name: "weft_http_request_seconds",
      help: "HTTP requests but upgrades, by the pattern of their path and the class of their status",
      labelNames: ["route", "status"],
      buckets: [0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10],
      registers: [registry],
    });
    gauge("weft_noise_connections", "Open Noise connections", () => sources.stats().connections);
    gauge("weft_machine_requests_open", "Open requests inside Noise", () => sources.stats().streams);
    gauge("weft_map_streams", "Open map streams", () => sources.stats().maps);
    gauge("weft_users", "Users", () => sources.users());
    gauge("weft_pending_logins", "Logins that wait for a person", () => sources.pendingLogins());
    gauge("headscale_nodestore_nodes", "Nodes", () => Object.values(sources.nodes()).reduce((a, b) => a + b));
    new Gauge({
      name: "weft_nodes",
      help: "Nodes by state",
      labelNames: ["state"],
      registers: [registry],
      collect() {
        for (const [state, count] of Object.entries(sources.nodes())) this.set({ state }, count);
      },
    });
  }

  /** Measures requests of the app that uses it first. */
  readonly request: MiddlewareHandler = async (c, next) => {
    const started = performance.now();
    await next();
    // The pattern of the handler that was reached last: what a stranger wrote stays out.
    const labels = { route: c.req.routePath, status: `${Math.floor(c.res.status / 100)}xx` };
    this.http.observe(labels, (performance.now() - started) / 1000);
  };

  /** Measures one write of the journal. */
  async timed(changes: readonly Change[], write: Promise<void>): Promise<void> {
    const started = performance.now();
    try {
      await write;
    } finally {
      this.journal.observe((performance.now() - started) / 1000);
      this.batchSize.observe(changes.length);
    }
    for (const { nodes = [], nodesRemoved = [] } of changes) {
      this.nodeOperations.add("put", nodes.length);
      this.nodeOperations.add("delete", nodesRemoved.length);
    }
  }
}
