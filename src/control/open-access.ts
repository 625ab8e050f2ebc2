// Who may know of whom where a policy has nothing to say: everybody sees and reaches everybody, and every router's routes.
// One answer serves all viewers, so that a join costs nothing here.
import type * as tc from "../wire/tailcfg.ts";
import type { Routing } from "./ha.ts";
import type { Model } from "./model.ts";
import { addressesOf, type Circle, circleOf, type Decision, type NodeView } from "./netmap.ts";
import { activeRoutes, isExitRoute } from "./routes.ts";

const ALLOW_ALL: tc.FilterRule[] = [{ SrcIPs: ["*"], DstPorts: [{ IP: "*", Ports: { First: 0, Last: 65535 } }] }];

export class OpenAccess {
  private peers: ReadonlyMap<number, NodeView> = new Map();
  private generation = -1;
  private everybody: Circle | null = null;
  /** Of the model, as of `everybody`. */
  private version = -1;

  constructor(
    private readonly model: Model,
    private readonly routing: Routing,
  ) {}

  get circle(): Circle {
    if (!this.everybody || this.version !== this.model.version) {
      this.version = this.model.version;
      this.everybody = circleOf(this.model.sortedNodes().map(({ id }) => id));
    }
    return this.everybody;
  }

  decide(viewer: number): Decision {
    if (this.generation !== this.routing.generation) {
      this.generation = this.routing.generation;
      this.peers = new Map([...this.routing.nodes].map((id) => [id, this.view(id, false)]));
    }
    return {
      self: this.peers.has(viewer) ? this.view(viewer, true) : null,
      filter: () => ALLOW_ALL,
      filterDigest: "open",
      sshRules: [],
      special: this.peers,
    };
  }

  /** A router as it sees itself, with all of its routes, or as its peers see it. */
  private view(id: number, isSelf: boolean): NodeView {
    const node = this.model.nodes.get(id)!;
    const primaryRoutes = this.routing.primaryRoutes(id);
    const routes = activeRoutes(node);
    const exits = routes.filter(isExitRoute);
    return {
      allowedIPs: [...addressesOf(node), ...(isSelf ? routes : [...primaryRoutes, ...exits])],
      primaryRoutes,
      capMap: exits.length > 0 && !isSelf ? { "suggest-exit-node": null } : {},
    };
  }
}
