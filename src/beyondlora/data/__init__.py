"""Rows in, model-ready batches out, in two stages.

>>> raw = read_splits(recipe)                 # reads, checks, splits: every complaint about the data comes from here
>>> splits = prepare(raw, processor, recipe)  # tokenises; nothing is written to disk
>>> batch = splits.collator([splits.train[0], splits.train[1]])

What becomes of a row (messages number rows from 1):

    causal-lm, plain text   One stream of tokens (an end token after each row; a .txt file is one text without any), cut
                            into blocks of max_length. Each block begins with what the tokenizer puts in front of a text
                            (<s>), or, where it puts nothing, with the token before. That head is not scored; every
                            other token of the stream is scored exactly once, those of the last, shorter block too.
    causal-lm, pairs        Prompt and separator as the model sees them at inference, then completion and end token;
                            only those are scored. Cut at max_length; a row without a scored token left is dropped, and
                            counted.
    sequence tasks          One or two sentences with the tokenizer's special tokens, cut at max_length, counted.
    images                  Resized and normalised when a batch asks for them.
"""

from .fields import is_packed as is_packed
from .fields import text_fields as text_fields
from .inputs import Evaluation as Evaluation
from .inputs import Splits as Splits
from .inputs import prepare as prepare
from .inputs import prepare_evaluation as prepare_evaluation
from .questions import Option as Option
from .questions import Question as Question
from .rows import arrow_column as arrow_column
from .rows import read_rows as read_rows
from .splits import RawSplits as RawSplits
from .splits import hold_out as hold_out
from .splits import read_checked as read_checked
from .splits import read_splits as read_splits
from .tokens import NOT_SCORED as NOT_SCORED
