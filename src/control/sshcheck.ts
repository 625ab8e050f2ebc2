// SSH check mode (spec/headscale-features.md, section 10): a rule with action "check" lets a session in when a person has
// agreed to it. The node that is connected to asks here, inside Noise, before it lets the session in:
//
//   GET /machine/ssh/action/SRC/to/DST?local_user=NAME            -> hold, with an address for the browser in the banner
//   GET /machine/ssh/action/SRC/to/DST?local_user=NAME&auth_id=ID -> long poll: accept or reject
//
// Who has agreed need not be asked again for the rule's checkPeriod: the pair of nodes is a document of the store, so a
// restart forgets nobody. It counts as long as the same rule is in force and the source has the same owner.
import type { ControlContext } from "./context.ts";
import { CommandError } from "./errors.ts";
import type { Logins, SSHCheckLogin } from "./login.ts";
import type { MachineAnswer, MachineRequest, MachineRouter } from "./machine.ts";
import { type Change, type DocumentChange, isAdmitted, type Millis, type NodeRecord } from "./model.ts";
import type { SSHAction, SSHDecision } from "./policy/index.ts";
import { isExpired } from "./register.ts";
import { BadRequest } from "./requests.ts";

/** An agreement to the sessions between two nodes; its id is "SRC-DST". */
export interface SSHApproval {
  sourceNodeId: number;
  targetNodeId: number;
  /** Owner of the source at that time. */
  ownerId: number;
  /** Who agreed; null: an administrator. */
  userId: number | null;
  until: Millis;
  /** Digest of the rule that asked for it. */
  rule: string;
}

declare module "./model.ts" {
  interface Documents {
    sshcheck: SSHApproval;
  }
}

/** As in useradd(8), wider: what a node may ask about is echoed to people. */
const LOGIN_NAME = /^[^\p{Cc}\s/]{1,128}$/u;

const NOT_ALLOWED = "the policy does not allow this session any more";
const UNKNOWN_SOURCE = "the node that you come from is not known here";

export class SSHChecks {
  constructor(
    private readonly ctx: ControlContext,
    private readonly logins: Logins,
  ) {
    logins.onCheckApproved = (request, userId) => this.approval(request, userId);
  }

  mount(router: MachineRouter): void {
    router.on("GET", "/machine/ssh/action/:src/to/:dst", (request) => this.answer(request));
  }

  private async answer({ connection, params, query, signal }: MachineRequest): Promise<MachineAnswer> {
    const target = this.node(params.dst!);
    if (!target || target.machineKey !== connection.machineKey) throw new BadRequest("node not found", 404);
    const localUser = query.get("local_user") ?? "";
    if (!LOGIN_NAME.test(localUser)) throw new BadRequest("local_user is no login name");
    const source = this.node(params.src!);
    if (!source) return rejected(UNKNOWN_SOURCE);
    const request: SSHCheckLogin = {
      kind: "ssh-check",
      sourceNodeId: source.id,
      targetNodeId: target.id,
      localUser,
    };
    const decision = this.decide(request);
    if (!decision) return rejected(NOT_ALLOWED);
    if (decision.action === "accept") return { json: decision.accept };
    const id = query.get("auth_id");
    if (id !== null) return this.verdict(id, request, decision, connection.address, signal);
    if (this.isApproved(source, target, decision)) return { json: decision.accept };
    return this.delegate(request, connection.address);
  }

  /** A node that may talk to others. */
  private node(text: string): NodeRecord | null {
    const node = /^\d{1,15}$/.test(text) ? this.ctx.model.nodes.get(Number(text)) : undefined;
    return node && isAdmitted(node) && !isExpired(node, this.ctx.now()) ? node : null;
  }

  private decide({ sourceNodeId, targetNodeId, localUser }: SSHCheckLogin): SSHDecision | null {
    return this.ctx.access.sshDecision(sourceNodeId, targetNodeId, localUser);
  }

  private async delegate(request: SSHCheckLogin, address: string): Promise<MachineAnswer> {
    const { id, url } = await this.logins.start(request, address);
    return {
      json: holding(request, id, `# This SSH session waits for approval. To approve it, visit:\n#\n#\t${url}\n#\n`),
    };
  }

  private async verdict(
    id: string,
    request: SSHCheckLogin,
    decision: SSHDecision,
    address: string,
    signal: AbortSignal,
  ): Promise<MachineAnswer> {
    const login = this.logins.get(id);
    // A session that is not known any more starts anew, and so does one that was about something else.
    if (!login || !sameSession(login.request, request)) return this.delegate(request, address);
    const verdict = await this.logins.wait(id, signal);
    // Its node may have been shut out while a person thought about it.
    const isKnown = this.node(String(request.sourceNodeId)) !== null;
    if (verdict?.approved) return isKnown ? { json: decision.accept } : rejected(UNKNOWN_SOURCE);
    if (verdict) return rejected(verdict.reason);
    if (signal.aborted) throw new BadRequest("the client has gone away");
    if (login.expiresAt <= this.ctx.now()) return rejected("nobody has approved this session in time");
    return this.delegate(request, address);
  }

  private isApproved(source: NodeRecord, target: NodeRecord, { rule, period }: SSHDecision): boolean {
    const approval = this.ctx.model.documents("sshcheck").get(idOf(source.id, target.id));
    return (
      approval !== undefined &&
      approval.rule === rule &&
      approval.ownerId === source.userId &&
      period > 0 &&
      approval.until > this.ctx.now()
    );
  }

  /** What an approved session changes. Throws CommandError when this user cannot approve it. */
  private approval(request: SSHCheckLogin, userId: number | null): Change {
    const source = this.ctx.model.nodes.get(request.sourceNodeId);
    const decision = this.ctx.model.nodes.has(request.targetNodeId) ? source && this.decide(request) : null;
    if (!source || !decision) throw new CommandError(409, "the policy does not allow this SSH session any more");
    if (userId !== null && source.userId !== userId)
      throw new CommandError(400, `this SSH session comes from ${source.givenName}, which belongs to somebody else`);
    if (decision.action === "accept" || decision.period === 0 || source.userId === null) return {};
    const value: SSHApproval = {
      sourceNodeId: source.id,
      targetNodeId: request.targetNodeId,
      ownerId: source.userId,
      userId,
      until: this.ctx.now() + decision.period,
      rule: decision.rule,
    };
    return { documents: [{ kind: "sshcheck", id: idOf(source.id, request.targetNodeId), value }] };
  }

  /** Forgets what has expired and what another policy asks for anew; refuses what waits and is not allowed any more. */
  async sweep(): Promise<void> {
    const { model, access, journal } = this.ctx;
    const now = this.ctx.now();
    const forbidden = this.logins.list().filter(({ request }) => request.kind === "ssh-check" && !this.decide(request));
    await Promise.all(forbidden.map(({ id }) => this.logins.reject(id, NOT_ALLOWED)));
    const isOver = ({ sourceNodeId, targetNodeId, ownerId, until, rule }: SSHApproval): boolean =>
      until <= now ||
      model.nodes.get(sourceNodeId)?.userId !== ownerId ||
      !model.nodes.has(targetNodeId) ||
      !access.hasSSHCheck(sourceNodeId, targetNodeId, rule);
    const documents = [...model.documents("sshcheck")]
      .filter(([, approval]) => isOver(approval))
      .map(([id]): DocumentChange => ({ kind: "sshcheck", id, value: null }));
    if (documents.length > 0) await journal.commit({ documents });
  }
}

function idOf(source: number, target: number): string {
  return `${source}-${target}`;
}

function sameSession(a: { kind: string } | SSHCheckLogin, b: SSHCheckLogin): boolean {
  return (
    "sourceNodeId" in a &&
    a.sourceNodeId === b.sourceNodeId &&
    a.targetNodeId === b.targetNodeId &&
    a.localUser === b.localUser
  );
}

/** The host of the address means nothing: clients ask through the connection that they have. */
function holding({ sourceNodeId, targetNodeId, localUser }: SSHCheckLogin, id: string, message: string): SSHAction {
  const query = new URLSearchParams({ local_user: localUser, auth_id: id });
  return {
    message,
    holdAndDelegate: `https://unused/machine/ssh/action/${sourceNodeId}/to/${targetNodeId}?${query}`,
  };
}

function rejected(reason: string): MachineAnswer {
  const action: SSHAction = { reject: true, message: `# This SSH session is refused: ${reason}.\n` };
  return { json: action };
}
