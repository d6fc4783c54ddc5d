"""What choosing a sequence's next token needs to know of its earlier ones, kept on the host."""

from __future__ import annotations

from .request import GenerationRequest
from .sampling.grammar import Grammars, GrammarState
from .sampling.penalties import TokenCounts


class HostState:
    """Token counts for penalties and the place in a grammar, as far as a request asks for them.

    Built from the request alone, so a continuation begins where the first run was.
    """

    def __init__(self, request: GenerationRequest, grammars: Grammars):
        """
        Raises:
            GrammarInvalid: the grammar can't be compiled or followed.
        """
        params = request.sampling
        self.counts: TokenCounts | None = None
        self.grammar: GrammarState | None = None
        if params.penalised:
            # Presence and frequency look at generated tokens alone.
            prompt = request.prompt_ids if params.repetition_penalty != 1.0 else ()
            self.counts = TokenCounts(prompt, request.output_ids)
        if params.grammar is not None:
            self.grammar = grammars.start(params.grammar, request.output_ids)

    def advance(self, token: int) -> None:
        """Takes the token that was chosen."""
        if self.counts is not None:
            self.counts.add(token)
        if self.grammar is not None:
            self.grammar.advance(token)

    @property
    def finished(self) -> bool:
        """The grammar allows nothing more."""
        return self.grammar is not None and self.grammar.finished

    @property
    def error(self) -> str | None:
        """Why the sequence can't go on."""
        return self.grammar.error if self.grammar is not None else None
