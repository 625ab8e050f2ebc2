// The web client of a node (port 5252 of its address, `tailscale set --webclient`): before a browser on another machine may
// change settings there, the node asks here, inside Noise, for the word of the person at that machine:
//
//   POST /machine/webclient/init/SRC/to/DST      -> { ID, URL }: an address for the browser
//   POST /machine/webclient/wait/SRC/to/DST/ID   -> { Complete: true } as soon as the person has agreed
//
// Official clients ask only Tailscale's own servers this; by others they let a node's owner in without it (seen in 1.102).
import type { ControlContext } from "./context.ts";
import type { Logins, WebClientLogin } from "./login.ts";
import type { MachineAnswer, MachineRequest, MachineRouter } from "./machine.ts";
import { isAdmitted, type NodeRecord } from "./model.ts";
import { isExpired } from "./register.ts";
import { BadRequest } from "./requests.ts";

export class WebClients {
  constructor(
    private readonly ctx: ControlContext,
    private readonly logins: Logins,
  ) {}

  mount(router: MachineRouter): void {
    router.on("POST", "/machine/webclient/init/:src/to/:dst", (request) => this.begin(request));
    router.on("POST", "/machine/webclient/wait/:src/to/:dst/:id", (request) => this.wait(request));
  }

  private async begin(request: MachineRequest): Promise<MachineAnswer> {
    const { id, url } = await this.logins.start(this.sessionOf(request), request.connection.address);
    return { json: { ID: id, URL: url } };
  }

  private async wait(request: MachineRequest): Promise<MachineAnswer> {
    const { sourceNodeId, targetNodeId } = this.sessionOf(request);
    const id = request.params.id!;
    const asked = this.logins.get(id)?.request;
    if (asked?.kind !== "web-client" || asked.sourceNodeId !== sourceNodeId || asked.targetNodeId !== targetNodeId)
      throw new BadRequest("this session is not known any more: open the page again", 404);
    const verdict = await this.logins.wait(id, request.signal);
    if (verdict?.approved) return { json: { ID: id, Complete: true } };
    if (verdict) throw new BadRequest(`this session is refused: ${verdict.reason}`, 403);
    throw new BadRequest("nobody has approved this session in time: open the page again", 404);
  }

  /** Throws BadRequest where there is nobody to ask, or nothing that could be allowed. */
  private sessionOf({ params, connection }: MachineRequest): WebClientLogin {
    const target = this.node(params.dst!);
    if (!target || target.machineKey !== connection.machineKey) throw new BadRequest("node not found", 404);
    const source = this.node(params.src!);
    if (!source || !this.ctx.access.sees(target.id, source.id))
      throw new BadRequest("the machine of this browser is not known here", 404);
    if (source.userId === null) throw new BadRequest("a tagged machine is nobody who could be asked", 403);
    if (target.userId !== null && target.userId !== source.userId)
      throw new BadRequest("this machine belongs to somebody else", 403);
    return { kind: "web-client", sourceNodeId: source.id, targetNodeId: target.id };
  }

  /** A node that may talk to others. */
  private node(text: string): NodeRecord | null {
    const node = /^\d{1,15}$/.test(text) ? this.ctx.model.nodes.get(Number(text)) : undefined;
    return node && isAdmitted(node) && !isExpired(node, this.ctx.now()) ? node : null;
  }
}
