// Policy file and settings of the tailnet, in /api/v2.
import { parse } from "jsonc-parser";
import { z } from "zod";
import type { ControlContext } from "../context.ts";
import { CommandError } from "../errors.ts";
import { PolicyError } from "../policy/index.ts";
import type { PolicyVersion } from "../policy-store.ts";
import { type Operation, operation } from "./operation.ts";
import { policyErrors } from "./policy-errors.ts";
import { ErrorV2, Settings, settingsIn, tailnet } from "./v2-shapes.ts";

const HUJSON = "application/hujson";
const BODIES = [HUJSON, "application/json"];
const DAY = 24 * 60 * 60_000;

/** What holds without a policy, for those who ask for one. */
const DEFAULT_POLICY = `{
	// No policy was set: everybody reaches everybody.
	"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}],
}
`;

export function policyV2(context: ControlContext): Operation[] {
  const { policies } = context;
  const answer = ({ text, etag }: PolicyVersion, accept: string): Response => {
    const shown = text === "" ? DEFAULT_POLICY : text;
    const isJson = accept.includes("application/json") && !accept.includes(HUJSON);
    const body = isJson ? JSON.stringify(parse(shown, [], { allowTrailingComma: true })) : shown;
    return new Response(body, {
      headers: { "Content-Type": isJson ? "application/json" : HUJSON, ETag: `"${etag}"` },
    });
  };
  const document = z.record(z.string(), z.unknown());
  return [
    operation({
      method: "get",
      path: "/tailnet/{tailnet}/acl",
      id: "getPolicyFile",
      tag: "Policy file",
      summary: "The policy in force: HuJSON, or JSON by Accept, with its ETag",
      scope: "policy_file:read",
      params: tailnet,
      response: document,
      textResponse: [HUJSON],
      handle: ({ c }) => answer(policies.current(), c.req.header("Accept") ?? ""),
    }),
    operation({
      method: "post",
      path: "/tailnet/{tailnet}/acl",
      id: "setPolicyFile",
      tag: "Policy file",
      summary: 'Put another policy in force; with If-Match only in place of that one ("ts-default": of none)',
      scope: "policy_file",
      params: tailnet,
      textBody: BODIES,
      body: z.string(),
      response: document,
      textResponse: [HUJSON],
      handle: ({ body, caller, c }) =>
        policyErrors(
          async () => {
            const ifMatch = c.req.header("If-Match");
            const version = await policies.set(body, { by: caller.name, ifMatch });
            return answer(version, c.req.header("Accept") ?? "");
          },
          { conflict: 412 },
        ),
    }),
    operation({
      method: "post",
      path: "/tailnet/{tailnet}/acl/validate",
      id: "validatePolicyFile",
      asks: true,
      tag: "Policy file",
      summary: "Whether a policy could be set, or, of a list of tests, whether the present one passes them",
      scope: "policy_file:read",
      params: tailnet,
      textBody: BODIES,
      body: z.string(),
      response: z.union([z.object({}), ErrorV2.partial()]),
      handle({ body }) {
        try {
          policies.check(/^\s*\[/.test(body) ? withTests(policies.current().text, body) : body);
          return {};
        } catch (error) {
          if (!(error instanceof PolicyError)) throw error;
          const data = error.failures.map(({ user, errors }) => ({ user, errors: [...errors] }));
          return { message: error.describe(), data };
        }
      },
    }),
    operation({
      method: "get",
      path: "/tailnet/{tailnet}/settings",
      id: "getTailnetSettings",
      tag: "Settings",
      summary: "What was chosen for the tailnet",
      scope: "feature_settings:read",
      params: tailnet,
      response: Settings,
      handle: () => settingsOf(),
    }),
    operation({
      method: "patch",
      path: "/tailnet/{tailnet}/settings",
      id: "updateTailnetSettings",
      tag: "Settings",
      summary: "Choose approval of devices, the lifetime of their keys, updates; of the rest, what holds is confirmed",
      scope: "feature_settings",
      params: tailnet,
      body: settingsIn,
      response: Settings,
      async handle({ body }) {
        const { devicesApprovalOn, devicesAutoUpdatesOn, devicesKeyDurationDays, ...fixed } = body;
        const present = settingsOf();
        for (const [name, value] of Object.entries(fixed)) requireSame(name as keyof typeof fixed, present, value);
        await context.choose({
          ...(typeof devicesApprovalOn === "boolean" && { "node.needs_approval": devicesApprovalOn }),
          ...(typeof devicesAutoUpdatesOn === "boolean" && { "auto_update.enabled": devicesAutoUpdatesOn }),
          // What is shown is rounded: the same number is no change.
          ...(typeof devicesKeyDurationDays === "number" &&
            devicesKeyDurationDays !== present.devicesKeyDurationDays && {
              "node.expiry": devicesKeyDurationDays === 0 ? null : devicesKeyDurationDays * DAY,
            }),
        });
        return settingsOf();
      },
    }),
  ];

  function settingsOf(): z.infer<typeof Settings> {
    const { settings } = context;
    return {
      aclsExternallyManagedOn: settings.policy.mode === "file",
      aclsExternalLink: "",
      devicesApprovalOn: settings.node.needsApproval,
      devicesAutoUpdatesOn: settings.autoUpdate,
      devicesKeyDurationDays: settings.node.expiry === null ? 0 : Math.max(1, Math.round(settings.node.expiry / DAY)),
      usersApprovalOn: false,
      usersRoleAllowedToJoinExternalTailnets: "none",
      networkFlowLoggingOn: false,
      regionalRoutingOn: false,
      postureIdentityCollectionOn: false,
      httpsEnabled: settings.dns.certificates !== null,
    };
  }
}

type Settled = Exclude<
  keyof z.infer<typeof Settings>,
  "devicesApprovalOn" | "devicesAutoUpdatesOn" | "devicesKeyDurationDays"
>;

/** Why each of these cannot be set here, and what there is in its place. */
const REASONS: Readonly<Record<Settled, string>> = {
  aclsExternallyManagedOn: "policy.mode of the server's configuration decides it",
  aclsExternalLink: "no page shows it, so write it as a comment into the policy",
  httpsEnabled: "dns.certificates of the server's configuration decides it",
  usersApprovalOn:
    "whom the identity provider's filters let in may join (oidc.allowed_domains, allowed_users, allowed_groups)",
  usersRoleAllowedToJoinExternalTailnets: "there is no other tailnet here",
  networkFlowLoggingOn: "this server takes no reports of flows, so watch the nodes' own metrics (tailscale metrics)",
  regionalRoutingOn: "routers of one subnet take over from each other by health, and grants choose one with `via`",
  postureIdentityCollectionOn:
    "this server collects no serial numbers, so set what postures compare as attributes of devices",
};

/** Throws CommandError unless a setting is as the caller wants it. */
function requireSame(name: Settled, { [name]: present }: z.infer<typeof Settings>, wanted: unknown): void {
  if (wanted === undefined || wanted === null || present === wanted) return;
  throw new CommandError(501, `${name} is ${JSON.stringify(present)} and cannot be set over the API: ${REASONS[name]}`);
}

/** The policy with other tests. */
function withTests(policy: string, tests: string): string {
  const list: unknown = parse(tests, [], { allowTrailingComma: true });
  const whole = policy === "" ? DEFAULT_POLICY : policy;
  return JSON.stringify({ ...parse(whole, [], { allowTrailingComma: true }), tests: list });
}
