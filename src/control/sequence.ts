// Ids of records that are documents: counted up, never used twice.
import type { DocumentChange, Model } from "./model.ts";

declare module "./model.ts" {
  interface Documents {
    /** By kind of record: the id given last. */
    sequence: number;
  }
}

/** The next id of a kind, and the document that says that it is taken: commit it with the record. */
export function nextId(model: Model, kind: string): { id: number; taken: DocumentChange } {
  const id = (model.documents("sequence").get(kind) ?? 0) + 1;
  return { id, taken: { kind: "sequence", id: kind, value: id } };
}
