"""Mistakes that drafters make, over one that copies what followed the last token before."""

from __future__ import annotations

from dovetail.interfaces.drafter import DrafterCapabilities
from dovetail.plugin.provider import DrafterOptions, DraftModelOptions, Options, Provider
from dovetail.types import DRAFTED_BY_WORKER
from sabotage import Sabotages

PROPOSALS, ENGINE = "test_proposals", "test_engine_invariants_hold"


class Copier:
    """Keeps, by sequence, what followed each token last. Itself it keeps the contract."""

    def __init__(self):
        self.followers = {}
        self.num_indexed = {}

    def propose(self, seq, max_tokens):
        followers = self.index(seq)
        draft, token = [], seq.tokens[-1]
        while len(draft) < max_tokens and token in followers:
            token = followers[token]
            draft.append(token)
        return draft

    def index(self, seq):
        followers = self.followers.setdefault(self.key(seq), {})
        for i in range(self.num_indexed.get(self.key(seq), 1), len(seq.tokens)):
            followers[seq.tokens[i - 1]] = seq.tokens[i]
        self.num_indexed[self.key(seq)] = len(seq.tokens)
        return followers

    def key(self, seq):
        return seq.seq_id

    def forget(self, seq_id):
        self.followers.pop(seq_id, None)
        self.num_indexed.pop(seq_id, None)


CAPABILITIES = DrafterCapabilities()
SABOTAGES = Sabotages(
    "speculation",
    Provider("copier", "for tests", lambda c, o: Copier(), DrafterOptions, CAPABILITIES),
)
sabotage = SABOTAGES.of_class(lambda cls, context, options: cls())


@sabotage(PROPOSALS)
class LeaksBetweenEqualIds(Copier):
    """What it kept of an ended sequence meets the next one of the same seq_id."""

    def forget(self, seq_id):
        self.num_indexed.pop(seq_id, None)


@sabotage(PROPOSALS)
class ContinuesAnothersIndex(Copier):
    """How far a sequence was indexed is not forgotten with it."""

    def forget(self, seq_id):
        self.followers.pop(seq_id, None)


@sabotage(PROPOSALS)
class OneIndexForAll(Copier):
    """It learns from other requests, and does not declare it."""

    def index(self, seq):
        super().index(seq)
        return {k: v for followers in self.followers.values() for k, v in followers.items()}


@sabotage(PROPOSALS)
class KeyedByTheRequest(Copier):
    """What it keeps is keyed by the request, whose samples differ."""

    def __init__(self):
        super().__init__()
        self.request_of = {}

    def key(self, seq):
        self.request_of[seq.seq_id] = seq.request.request_id
        return seq.request.request_id

    def forget(self, seq_id):
        super().forget(self.request_of.pop(seq_id, None))


@sabotage(PROPOSALS)
class BelievesItsDrafts(Copier):
    """What it proposed is indexed as if it had been accepted."""

    def propose(self, seq, max_tokens):
        draft = super().propose(seq, max_tokens)
        for a, b in zip(draft, draft[1:] + draft[:1], strict=True):
            self.followers[seq.seq_id][a] = b
        return draft


@sabotage(PROPOSALS)
class AppendsToTheSequence(Copier):
    """The draft is built in `seq.tokens`, and the last of it left there."""

    def propose(self, seq, max_tokens):
        draft = super().propose(seq, max_tokens)
        seq.tokens += draft[:1]
        return draft


@sabotage(PROPOSALS)
class SetsTheSequencesDrafts(Copier):
    """The draft is also put where the engine keeps it."""

    def propose(self, seq, max_tokens):
        seq.draft_token_ids = super().propose(seq, max_tokens)
        return seq.draft_token_ids


@sabotage(PROPOSALS)
class TooMany(Copier):
    """One token more than was asked for."""

    def propose(self, seq, max_tokens):
        return super().propose(seq, max_tokens + 1)


@sabotage(PROPOSALS, ENGINE)
class AlwaysAsMany(Copier):
    """As many tokens as it likes, however few were asked for near the end."""

    def propose(self, seq, max_tokens):
        return [*super().propose(seq, 4), 0, 0, 0, 0][:4]


@sabotage(PROPOSALS, ENGINE)
class TokensThatDoNotExist(Copier):
    """Where it has no guess it proposes the token after the vocabulary's last."""

    def propose(self, seq, max_tokens):
        return super().propose(seq, max_tokens) or [64]


@sabotage(PROPOSALS, ENGINE)
class NoGuessIsMinusOne(Copier):
    """Where it has no guess it proposes -1."""

    def propose(self, seq, max_tokens):
        return super().propose(seq, max_tokens) or [-1]


@sabotage(PROPOSALS, ENGINE)
class NotAList(Copier):
    """A tuple is returned."""

    def propose(self, seq, max_tokens):
        return tuple(super().propose(seq, max_tokens))


@sabotage(PROPOSALS, ENGINE)
class NothingAtAll(Copier):
    """Where it has no guess it returns None."""

    def propose(self, seq, max_tokens):
        return super().propose(seq, max_tokens) or None


@sabotage(PROPOSALS, ENGINE)
class RaisesForShortSequences(Copier):
    """It looks at the last three tokens, and a sequence may have fewer."""

    def propose(self, seq, max_tokens):
        _, _, _ = seq.tokens[-3:]
        return super().propose(seq, max_tokens)


@sabotage(PROPOSALS)
class RaisesWhenAskedAgain(Copier):
    """It takes for granted that a sequence has grown since it was last asked about; its step may
    have had no room for it."""

    def propose(self, seq, max_tokens):
        assert self.num_indexed.get(seq.seq_id) != len(seq.tokens)
        return super().propose(seq, max_tokens)


@sabotage(PROPOSALS)
class ForgetRaises(Copier):
    """Forgetting a sequence that was never asked about raises."""

    def forget(self, seq_id):
        del self.followers[seq_id], self.num_indexed[seq_id]


@sabotage(PROPOSALS)
class GuessesByChance(Copier):
    """A proposal depends on how often it was asked."""

    num_asked = 0

    def propose(self, seq, max_tokens):
        self.num_asked += 1
        return [self.num_asked % 64]


@sabotage("test_two_engines_do_not_meet")
class StateOfTheClass(Copier):
    """What it keeps is kept by the class: two engines of one process share it."""

    shared = {}, {}

    def __init__(self):
        self.followers, self.num_indexed = self.shared


@sabotage("test_ended_sequences_are_let_go")
class KeepsTheEnded(Copier):
    """What it keeps of a sequence is kept for ever."""

    def __init__(self):
        super().__init__()
        self.all = []

    def propose(self, seq, max_tokens):
        self.all.append(seq)
        return super().propose(seq, max_tokens)


@sabotage("test_declaration", options=Options)
class OptionsOfAnotherKind(Copier):
    """The options know no `num_draft_tokens`."""


@sabotage("test_declaration", capabilities=None)
class NoCapabilities(Copier):
    """Nothing is declared."""


IN_WORKER = DrafterCapabilities(runs_in="worker")


@sabotage(PROPOSALS, ENGINE, options=DraftModelOptions, capabilities=IN_WORKER)
class GuessesForTheWorker(Copier):
    """It runs in the worker by its declaration, and proposes tokens of its own."""

    def propose(self, seq, max_tokens):
        return super().propose(seq, max_tokens) or [5]


@sabotage("test_declaration", capabilities=IN_WORKER)
class NamesNoModel(Copier):
    """It runs in the worker, and its options do not say with which model."""

    def propose(self, seq, max_tokens):
        return [DRAFTED_BY_WORKER] * max_tokens
