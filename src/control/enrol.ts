// Register requests from the network: what `register.ts` plans is done here, logins that it asks for are started and waited
// for (login.ts), and guessing is slowed down.
import type { Attempts } from "../net/ratelimit.ts";
import type { RegisterResponse } from "../wire/tailcfg.ts";
import type { ControlContext } from "./context.ts";
import { type Logins, loginIdOf } from "./login.ts";
import { LoginRefused, planRegister, type Registration } from "./register.ts";
import { BadRequest, type RegisterInput } from "./requests.ts";
import type { Connection } from "./ts2021.ts";

/** Milliseconds before a client whose login was pushed out gets another: where all are waited for, each pushes out another. */
const EVICTION_PAUSE = 1000;

export class Enrolment {
  constructor(
    private readonly ctx: ControlContext,
    private readonly logins: Logins,
    private readonly attempts: Attempts,
  ) {}

  /** `signal`: the client has gone away. Throws BadRequest. */
  async register(input: RegisterInput, connection: Connection, signal: AbortSignal): Promise<RegisterResponse> {
    const first = this.plan(input, connection);
    if (first.kind === "answer") return this.answer(first);
    const verdict = input.followup === "" ? null : await this.verdict(input, connection, signal);
    if (verdict && !verdict.approved) return { Error: verdict.reason };
    if (verdict) {
      const approved = this.plan(input, connection);
      if (approved.kind === "answer") return this.answer(approved);
    }
    const { machineKey, address } = connection;
    const { url } = await this.logins.start({ kind: "register", machineKey, input }, address);
    return { AuthURL: url, MachineAuthorized: false };
  }

  /** Of the login that a follow-up names; null: there is none, so that another has to be started. */
  private async verdict(input: RegisterInput, { machineKey }: Connection, signal: AbortSignal) {
    const id = loginIdOf(input.followup);
    const login = id === null ? null : this.logins.get(id);
    const request = login?.request;
    if (request?.kind !== "register" || request.machineKey !== machineKey || request.input.nodeKey !== input.nodeKey)
      return null;
    // Clients ask again after a refusal: to hear it twice would end the next `tailscale up` as well.
    if (login!.told) return null;
    const verdict = await this.logins.wait(login!.id, signal);
    if (signal.aborted) throw new BadRequest("the client has gone away", 503);
    if (verdict?.approved === false) await this.logins.told(login!.id);
    const isEvicted = verdict === null && login!.expiresAt > this.ctx.now();
    if (isEvicted) await new Promise((resolve) => setTimeout(resolve, EVICTION_PAUSE));
    return verdict;
  }

  private plan(input: RegisterInput, { machineKey, address }: Connection): Registration {
    const { model, log } = this.ctx;
    const now = this.ctx.now();
    let plan: Registration;
    try {
      plan = planRegister(this.ctx, input, machineKey);
    } catch (error) {
      if (error instanceof LoginRefused) return { kind: "answer", change: null, response: { Error: error.message } };
      throw error;
    }
    if (plan.kind === "login") return plan;
    if (plan.guess === undefined) {
      if (plan.change && input.authKey !== "" && !model.nodeByKey(input.nodeKey)) this.attempts.succeeded(address);
      return plan;
    }
    // Only who guesses waits: neighbours behind the same NAT, whose keys are right, must not suffer for it.
    const wait = this.attempts.wait(address, now);
    if (wait > 0) {
      const seconds = Math.ceil(wait / 1000);
      throw new BadRequest(`too many wrong pre-auth keys from ${address}: wait ${seconds} seconds`, 429, seconds);
    }
    this.attempts.failed(address, now);
    log(`${address}: ${plan.guess}`);
    return plan;
  }

  private async answer({ change, response }: Registration & { kind: "answer" }): Promise<RegisterResponse> {
    if (change) await this.ctx.journal.commit(change);
    return response;
  }
}
