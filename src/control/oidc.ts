// Identity providers (OpenID Connect), by openid-client: discovery, authorization code with PKCE, id token, userinfo; and
// what their claims mean here (spec/headscale-features.md, section 7.4).
import * as client from "openid-client";
import type { Millis, UserRecord } from "./model.ts";
import { userNameProblem } from "./names.ts";
import { ROLES, type Role } from "./policy/index.ts";
import type { OidcSettings } from "./settings.ts";

/** Seconds for each request to a provider. */
const TIMEOUT = 10;
/** Milliseconds between tries to find a provider that did not answer. */
const RETRY = 10_000;
const MAX_TEXT = 200;
const MAX_URL = 2048;
const MAX_GROUPS = 1000;
/** OpenID Connect Core, section 2. */
const MAX_SUBJECT = 255;

/** Who signed in, as far as it is believed. */
export interface Identity {
  /** Issuer and subject: who it is, for ever. */
  providerId: string;
  /** "" when the provider gave none that is a user name here. */
  name: string;
  displayName: string;
  /** "" when there is none, or none that counts. */
  email: string;
  profilePicUrl: string;
  /** As the provider names them. */
  groups: readonly string[];
  /** As the policy names them behind "group:". */
  policyGroups: readonly string[];
  /** Null: the provider does not decide it. */
  role: Role | null;
  /** Of the id token. */
  expiry: Millis;
}

/** What was made up for one login, and must come back. */
export interface Challenge {
  state: string;
  nonce: string;
  /** Null: without PKCE. */
  verifier: string | null;
}

/** The provider did not answer, or not as it must; the message is for the log and the user. */
export class ProviderError extends Error {
  override name = "ProviderError";
}

type Claims = Readonly<Record<string, unknown>>;

export class Provider {
  private found: client.Configuration | null = null;
  private looking: Promise<void> | null = null;
  private lastLook = Number.NEGATIVE_INFINITY;

  constructor(
    readonly settings: OidcSettings,
    /** Where the provider sends browsers back to. */
    private readonly redirectUri: string,
    private readonly log: (line: string) => void,
  ) {}

  /** Throws ProviderError when it cannot be found. */
  async find(): Promise<void> {
    const { issuer, clientId, clientSecret } = this.settings;
    try {
      const url = new URL(issuer);
      const isPlain = url.protocol === "http:";
      if (isPlain && !/^(localhost|127\.[\d.]+|\[::1\])$/.test(url.hostname))
        this.log(
          `warning: the identity provider ${issuer} is asked over plain HTTP: whoever is on the way can sign in as anybody`,
        );
      const insecure = isPlain ? [client.allowInsecureRequests] : [];
      const found = await client.discovery(url, clientId, undefined, undefined, {
        execute: insecure,
        timeout: TIMEOUT,
      });
      const metadata = found.serverMetadata();
      const methods = metadata.token_endpoint_auth_methods_supported ?? ["client_secret_basic"];
      const authentication =
        clientSecret === ""
          ? client.None()
          : methods.includes("client_secret_basic")
            ? client.ClientSecretBasic(clientSecret)
            : client.ClientSecretPost(clientSecret);
      this.found = new client.Configuration(metadata, clientId, clientSecret, authentication);
      this.found.timeout = TIMEOUT;
      for (const allow of insecure) allow(this.found);
    } catch (error) {
      throw new ProviderError(
        `the identity provider ${this.settings.name} (${issuer}) cannot be used: ${reasonOf(error)}`,
      );
    }
  }

  /** Whether it can be used; one that did not answer is tried again now and then. */
  async isReady(now: Millis): Promise<boolean> {
    if (!this.found && (this.looking || now - this.lastLook >= RETRY)) {
      this.lastLook = now;
      this.looking ??= this.find()
        .catch((error: Error) => this.log(`${error.message}; machines can be let in by weft auth register`))
        .finally(() => {
          this.looking = null;
        });
      await this.looking;
    }
    return this.found !== null;
  }

  challenge(): Challenge {
    return {
      state: client.randomState(),
      nonce: client.randomNonce(),
      verifier: this.settings.pkce === "off" ? null : client.randomPKCECodeVerifier(),
    };
  }

  /** Where to send the browser. */
  async authorizationUrl({ state, nonce, verifier }: Challenge): Promise<string> {
    const { scope, extraParams, pkce } = this.settings;
    const challenge =
      verifier === null || pkce === "plain" ? verifier : await client.calculatePKCECodeChallenge(verifier);
    const parameters = {
      ...extraParams,
      redirect_uri: this.redirectUri,
      scope: scope.join(" "),
      state,
      nonce,
      ...(challenge !== null && { code_challenge: challenge, code_challenge_method: pkce }),
    };
    return client.buildAuthorizationUrl(this.configuration(), parameters).href;
  }

  /** `callback`: the address that the browser came back with. Throws ProviderError. */
  async identify(callback: URL, { state, nonce, verifier }: Challenge): Promise<Identity> {
    const configuration = this.configuration();
    const address = new URL(this.redirectUri);
    address.search = callback.search;
    let tokens: Awaited<ReturnType<typeof client.authorizationCodeGrant>>;
    try {
      tokens = await client.authorizationCodeGrant(configuration, address, {
        expectedState: state,
        expectedNonce: nonce,
        idTokenExpected: true,
        ...(verifier !== null && { pkceCodeVerifier: verifier }),
      });
    } catch (error) {
      throw new ProviderError(`${this.settings.name} did not confirm the login: ${reasonOf(error)}`);
    }
    const claims = tokens.claims()!;
    return identityOf({ ...claims, ...(await this.userinfo(tokens.access_token, claims.sub)) }, claims, this.settings);
  }

  /** What is said there goes beyond the id token; a provider that refuses it has to make do with the token. */
  private async userinfo(accessToken: string, subject: string): Promise<Claims> {
    const configuration = this.configuration();
    if (!configuration.serverMetadata().userinfo_endpoint) return {};
    try {
      return await client.fetchUserInfo(configuration, accessToken, subject);
    } catch (error) {
      this.log(`${this.settings.name} tells nothing at its userinfo endpoint: ${reasonOf(error)}`);
      return {};
    }
  }

  private configuration(): client.Configuration {
    if (!this.found) throw new ProviderError(`the identity provider ${this.settings.name} does not answer`);
    return this.found;
  }
}

function reasonOf(error: unknown): string {
  if (error instanceof client.AuthorizationResponseError || error instanceof client.ResponseBodyError)
    return error.error_description ?? error.error;
  const { message, cause } = error as Error;
  return cause instanceof Error ? `${message} (${cause.message})` : message;
}

/** `token`: the claims of the id token alone, which decide who it is and how long. Throws ProviderError. */
export function identityOf(
  claims: Claims,
  token: { iss: string; sub: string; exp: number },
  settings: OidcSettings,
): Identity {
  if (token.sub === "" || token.sub.length > MAX_SUBJECT)
    throw new ProviderError(
      `${settings.name} names a subject of ${token.sub.length} characters, where 1 to ${MAX_SUBJECT} are allowed: choose another claim for "sub" there`,
    );
  const name = text(claims.preferred_username, MAX_TEXT);
  const isVerified = claims.email_verified === true || claims.email_verified === "true";
  const picture = text(claims.picture, MAX_URL);
  const groups = groupsOf(claims[settings.groupsClaim]);
  return {
    providerId: `${token.iss.replace(/\/+$/, "")}/${token.sub}`,
    name: userNameProblem(name) === null ? name : "",
    displayName: text(claims.name, MAX_TEXT),
    email: isVerified || !settings.emailVerifiedRequired ? text(claims.email, MAX_TEXT) : "",
    profilePicUrl: /^https?:\/\//.test(picture) ? picture : "",
    groups,
    policyGroups: groups.map((group) => settings.groupsPrefix + group),
    role: roleOf(groups, settings),
    expiry: token.exp * 1000,
  };
}

function text(value: unknown, max: number): string {
  return typeof value === "string" && value.length <= max ? value : "";
}

/** Some providers write a single group as a text. */
function groupsOf(claim: unknown): string[] {
  const list: unknown[] = Array.isArray(claim) ? claim.slice(0, MAX_GROUPS) : [claim];
  return [...new Set(list.map((group) => text(group, MAX_TEXT)).filter((group) => group !== ""))].sort();
}

/** The highest role that a group gives; null: no group gives any, so administrators do. */
function roleOf(groups: readonly string[], { roles }: OidcSettings): Role | null {
  if (Object.keys(roles).length === 0) return null;
  return ROLES.find((role) => roles[role]?.some((group) => groups.includes(group))) ?? "member";
}

/** Whether the groups of a user's provider decide the role, so that nobody else can. */
export function isRoleProvided({ providerId }: UserRecord, providers: readonly OidcSettings[]): boolean {
  return providers.some(
    ({ issuer, roles }) => Object.keys(roles).length > 0 && providerId.startsWith(`${issuer.replace(/\/+$/, "")}/`),
  );
}

/** Why this person may not sign in here; null when nothing speaks against it. Each list that is not empty must be passed. */
export function refusalOf({ email, groups }: Identity, settings: OidcSettings): string | null {
  const { allowedDomains, allowedUsers, allowedGroups } = settings;
  const lower = (values: readonly string[]) => values.map((value) => value.toLowerCase());
  const mail = email.toLowerCase();
  if (allowedGroups.length > 0 && !groups.some((group) => allowedGroups.includes(group)))
    return "you are in none of the groups that may use this server";
  if (allowedDomains.length > 0 || allowedUsers.length > 0) {
    if (mail === "")
      return "your identity provider has told no verified mail address of yours, which this server asks for";
    if (allowedDomains.length > 0 && !lower(allowedDomains).includes(mail.slice(mail.lastIndexOf("@") + 1)))
      return `mail addresses like ${email} may not use this server`;
    if (allowedUsers.length > 0 && !lower(allowedUsers).includes(mail)) return `${email} may not use this server`;
  }
  return null;
}

/** The user as the identity says: the one with this provider id, refreshed, or a new one. */
export function userFrom(identity: Identity, known: UserRecord | undefined, newId: number, now: Millis): UserRecord {
  const { providerId, name, displayName, email, profilePicUrl, policyGroups: groups } = identity;
  const profile = { name, displayName, email, profilePicUrl, groups, provider: "oidc", providerId };
  const role = identity.role ?? known?.role ?? "member";
  return known ? { ...known, ...profile, role } : { id: newId, ...profile, role, status: "active", createdAt: now };
}
