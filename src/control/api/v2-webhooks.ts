// Webhooks, in /api/v2.
import { z } from "zod";
import { timeText } from "../netmap.ts";
import { PROVIDERS, SUBSCRIPTIONS, type WebhookRecord } from "../webhooks.ts";
import type { ApiParts } from "./index.ts";
import { type Operation, operation } from "./operation.ts";
import { empty, text } from "./shapes.ts";
import { tailnet } from "./v2-shapes.ts";

const subscriptions = z.array(z.enum(SUBSCRIPTIONS)).min(1).max(SUBSCRIPTIONS.length);
const provider = z.enum(PROVIDERS);
const endpointUrl = text
  .refine((value) => /^https?:$/.test(URL.parse(value)?.protocol ?? ""), "must be an http or https URL")
  .meta({ examples: ["http://127.0.0.1:9/hook"] });
const params = z.object({ endpoint: z.string().meta({ examples: ["0123456789abcdef"] }) });

const Webhook = z
  .object({
    endpointId: z.string(),
    endpointUrl: z.string(),
    providerType: provider,
    creatorLoginName: z.string(),
    created: z.iso.datetime(),
    lastModified: z.iso.datetime(),
    subscriptions: z.array(z.enum(SUBSCRIPTIONS)),
    secret: z.string().optional().meta({ description: "Only in the answer that made it." }),
  })
  .meta({ id: "Webhook" });

export function webhooksV2({ webhooks }: ApiParts): Operation[] {
  const tag = "Webhooks";
  const read = { method: "get", tag, scope: "webhooks:read" } as const;
  const write = { method: "post", tag, scope: "webhooks" } as const;
  return [
    operation({
      ...read,
      path: "/tailnet/{tailnet}/webhooks",
      id: "listWebhooks",
      summary: "Webhooks, without their secrets",
      params: tailnet,
      response: z.object({ webhooks: z.array(Webhook) }),
      handle: () => ({ webhooks: webhooks.list().map(shown) }),
    }),
    operation({
      ...write,
      path: "/tailnet/{tailnet}/webhooks",
      id: "createWebhook",
      summary: "Have events posted to an address; the answer has the secret that signs them, this once",
      params: tailnet,
      body: z.object({ endpointUrl, providerType: provider.nullish(), subscriptions }),
      response: Webhook,
      async handle({ body, caller }) {
        const record = await webhooks.create({
          url: body.endpointUrl,
          provider: body.providerType ?? "",
          subscriptions: body.subscriptions,
          creator: caller.name,
        });
        return { ...shown(record), secret: record.secret };
      },
    }),
    operation({
      ...read,
      path: "/webhooks/{endpoint}",
      id: "getWebhook",
      summary: "One of them",
      params,
      response: Webhook,
      handle: ({ params }) => shown(webhooks.get(params.endpoint)),
    }),
    operation({
      ...write,
      method: "patch",
      path: "/webhooks/{endpoint}",
      id: "updateWebhook",
      summary: "Subscribe it to other events",
      params,
      body: z.object({ subscriptions }),
      response: Webhook,
      handle: async ({ params, body }) => shown(await webhooks.update(params.endpoint, body.subscriptions)),
    }),
    operation({
      ...write,
      method: "delete",
      path: "/webhooks/{endpoint}",
      id: "deleteWebhook",
      summary: "Delete it; what waits for it is dropped",
      params,
      response: empty,
      async handle({ params }) {
        await webhooks.delete(params.endpoint);
        return {};
      },
    }),
    operation({
      ...write,
      path: "/webhooks/{endpoint}/test",
      id: "testWebhook",
      summary: "Post an event that says that it is a test",
      params,
      response: empty,
      async handle({ params }) {
        await webhooks.test(params.endpoint);
        return {};
      },
    }),
    operation({
      ...write,
      path: "/webhooks/{endpoint}/rotate",
      id: "rotateWebhookSecret",
      summary: "Give it another secret, which the answer has, this once",
      params,
      response: Webhook,
      async handle({ params }) {
        const record = await webhooks.rotate(params.endpoint);
        return { ...shown(record), secret: record.secret };
      },
    }),
  ];
}

function shown(record: WebhookRecord): z.input<typeof Webhook> {
  return {
    endpointId: record.id,
    endpointUrl: record.url,
    providerType: record.provider,
    creatorLoginName: record.creator,
    created: timeText(record.createdAt),
    lastModified: timeText(record.updatedAt),
    subscriptions: [...record.subscriptions],
  };
}
