// Pages of lists that grow. Without a limit the list is given whole.

/** `list` in the order of `idOf`. The entries after `pageToken`, at most `limit`, and the token of the next page. */
export function pageOf<T>(
  list: readonly T[],
  idOf: (entry: T) => number,
  { limit, pageToken = 0 }: { limit?: number | undefined; pageToken?: number | undefined },
): { entries: T[]; more: { nextPageToken?: string } } {
  const rest = pageToken === 0 ? [...list] : list.filter((entry) => idOf(entry) > pageToken);
  if (limit === undefined || rest.length <= limit) return { entries: rest, more: {} };
  const entries = rest.slice(0, limit);
  return { entries, more: { nextPageToken: String(idOf(entries.at(-1)!)) } };
}
