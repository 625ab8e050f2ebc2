// Contacts of the tailnet, in /api/v2: whom its people write to about it. Stored settings: this server sends no mail, so none
// is verified.
import { z } from "zod";
import type { ControlContext } from "../context.ts";
import { CommandError } from "../errors.ts";
import { type Operation, operation } from "./operation.ts";
import { empty } from "./shapes.ts";
import { tailnet } from "./v2-shapes.ts";

const CONTACTS = ["account", "support", "security"] as const;

declare module "../model.ts" {
  interface Documents {
    /** By what it is for: the mail address. */
    contact: string;
  }
}

const Contact = z
  .object({
    email: z.string().meta({ description: "Empty: none was set." }),
    needsVerification: z.boolean().meta({ description: "Never: this server sends no mail." }),
  })
  .meta({ id: "Contact" });
const params = tailnet.extend({ contactType: z.enum(CONTACTS) });
const email = z
  .string()
  .max(200)
  .regex(/^[^\s@]+@[^\s@]+$/, "must be a mail address")
  .meta({ examples: ["ops@example.com"] });

export function contactsV2({ model, journal }: ControlContext): Operation[] {
  const shown = (type: (typeof CONTACTS)[number]) => ({
    email: model.documents("contact").get(type) ?? "",
    needsVerification: false,
  });
  const tag = "Contacts";
  return [
    operation({
      method: "get",
      path: "/tailnet/{tailnet}/contacts",
      id: "getContacts",
      tag,
      summary: "Whom to write to about the tailnet",
      scope: "account_settings:read",
      params: tailnet,
      response: z.object({ account: Contact, support: Contact, security: Contact }),
      handle: () => ({ account: shown("account"), support: shown("support"), security: shown("security") }),
    }),
    operation({
      method: "patch",
      path: "/tailnet/{tailnet}/contacts/{contactType}",
      id: "updateContact",
      tag,
      summary: "Set one of them; it holds at once",
      scope: "account_settings",
      params,
      body: z.object({ email: email.nullish() }),
      response: empty,
      async handle({ params, body }) {
        if (body.email)
          await journal.commit({ documents: [{ kind: "contact", id: params.contactType, value: body.email }] });
        return {};
      },
    }),
    operation({
      method: "post",
      path: "/tailnet/{tailnet}/contacts/{contactType}/resend-verification-email",
      id: "resendContactVerificationEmail",
      tag,
      summary: "Refused: no contact waits for verification here",
      scope: "account_settings",
      params,
      response: empty,
      handle() {
        throw new CommandError(
          409,
          "no contact waits for verification: this server sends no mail and takes addresses as they are",
        );
      },
    }),
  ];
}
