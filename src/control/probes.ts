// Asks routers that share a subnet whether they are well, and moves their routes when one is not (ha.ts decides).
import type { ControlContext } from "./context.ts";
import { Prober } from "./ha.ts";
import type { Pings } from "./pings.ts";

/** Milliseconds: a clock that jumps must not stop the probes. */
const MAX_SLEEP = 5_000;

export class Probes {
  private readonly prober: Prober | null;
  private timer: ReturnType<typeof setTimeout> | null = null;
  private stopped = false;

  constructor(
    private readonly ctx: ControlContext,
    private readonly pings: Pings,
  ) {
    const { probeInterval, probeTimeout } = ctx.settings.node.routes;
    this.prober = probeInterval === null ? null : new Prober({ interval: probeInterval, timeout: probeTimeout });
  }

  /** Does what is due, and wakes for what comes next. */
  step(): void {
    if (!this.prober || this.stopped) return;
    const { ctx, prober } = this;
    const { ask, sick } = prober.step(ctx.now(), ctx.access.routing.contested());
    for (const nodeId of sick) this.found(nodeId, false);
    for (const { nodeId, question } of ask) {
      // Whom the question does not reach, or who does not answer, is late: the next steps see it.
      this.pings.ask(nodeId, {}, ctx.settings.node.routes.probeTimeout, () => {
        if (prober.answered(nodeId, question, ctx.now())) this.found(nodeId, true);
      });
    }
    this.schedule();
  }

  connected(nodeId: number): void {
    this.prober?.connected(nodeId);
    this.found(nodeId, true);
  }

  disconnected(nodeId: number): void {
    if (!this.prober || !this.ctx.access.routing.contested().includes(nodeId)) return;
    this.prober.disconnected(nodeId, this.ctx.now());
    this.schedule();
  }

  stop(): void {
    this.stopped = true;
    if (this.timer) clearTimeout(this.timer);
  }

  private schedule(): void {
    if (this.stopped) return;
    if (this.timer) clearTimeout(this.timer);
    const wait = Math.min(Math.max(this.prober!.wakeAt - this.ctx.now(), 10), MAX_SLEEP);
    this.timer = setTimeout(() => this.step(), wait);
  }

  private found(nodeId: number, healthy: boolean): void {
    const { routing } = this.ctx.access;
    if (routing.isHealthy(nodeId) === healthy) return;
    const before = routing.generation;
    routing.setHealthy(nodeId, healthy);
    const name = this.ctx.model.nodes.get(nodeId)?.givenName ?? "";
    this.ctx.log(
      `router ${nodeId} (${name}) ${healthy ? "answers again" : "does not answer: others serve its subnets, if they can"}`,
    );
    if (routing.generation !== before) this.ctx.poke();
  }
}
