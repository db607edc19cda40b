"""Lines that must not be broken unnoticed: each with a wrong line, and the tests that must fail.

A test that cannot fail proves nothing. `python -m tests.mutate` breaks each of these lines in a
copy of the project and expects its tests to fail there; a part of them runs in CI. A fast test sees
to it that each line stands exactly once where it is said to stand.
"""

import ast
from pathlib import Path
from typing import NamedTuple

from study.exercise import EXERCISES, emptied, function


class Mutation(NamedTuple):
    file: str
    line: str  # it occurs exactly once in the file
    wrong: str
    tests: str  # of which one must fail: what pytest is given
    why: str


def of(file: str, *rows) -> list[Mutation]:
    """Of rows (line, wrong, why, test): the one that fails."""
    return [Mutation(file, line, wrong, f"tests/{test}", why) for line, wrong, why, test in rows]


RULES = of(
    "sampling.py",
    (
        "return (p_x / q_x).clamp(max=1.0)",
        "return (p_x / q_x).clamp(max=0.9)",
        "tokens are rejected that the rule accepts",
        "test_rule.py::test_a_cycle_writes_exactly_the_targets_law",
    ),
    (
        "excess = (p - q).clamp(min=0.0)",
        "excess = p",
        "after a rejection the token comes from p, so the rejected ones come too often",
        "test_rule.py::test_a_cycle_writes_exactly_the_targets_law",
    ),
    (
        "return torch.where(total > 0, excess / total, p)",
        "return excess / total",
        "where p = q the residual is 0 / 0",
        "test_rule.py::test_the_residual_is_a_law_even_where_nothing_is_left",
    ),
    (
        "threshold = u[..., None].double() * cumulative[..., -1:]",
        "threshold = u[..., None].float() * cumulative[..., -1:].float()",
        "float32 can pass the end of the sum, and draw what is impossible",
        "test_rule.py::test_sample_never_returns_the_impossible",
    ),
    (
        "torch.searchsorted(cumulative, threshold, right=True)",
        "torch.searchsorted(cumulative, threshold)",
        "at u = 0 a token of probability 0 is drawn",
        "test_rule.py::test_sample_never_returns_the_impossible",
    ),
    (
        "ordered = ordered.masked_fill(before >= max(top_p, SMALLEST), 0.0)",
        "ordered = ordered.masked_fill(before > max(top_p, SMALLEST), 0.0)",
        "top-p keeps a token more than it takes",
        "test_rule.py::test_top_p_takes_the_first_of_ties",
    ),
    (
        "logits = logits.masked_fill(logits < last_kept, -math.inf)",
        "logits = logits.masked_fill(logits <= last_kept, -math.inf)",
        "top-k keeps a token less",
        "test_rule.py::test_top_k_keeps_the_k_likeliest_in_proportion",
    ),
    (
        "return q.new_zeros(len(q), self.whole).index_copy_(1, self.tokens, q)",
        "return torch.nn.functional.pad(q, (0, self.whole - q.shape[-1]))",
        "q stands at the places of other tokens",
        "test_model.py::test_rows_and_laws_of_tokens_agree_with_their_indices",
    ),
    (
        "return indices if self.tokens is None else self.tokens[indices]",
        "return indices",
        "places among the logits are taken for tokens",
        "test_model.py::test_tokens_and_their_indices_agree",
    ),
)
RULES += of(
    "speculate.py",
    (
        "accepted = passes.long().cumprod(-1).sum(-1)  # the leading ones",
        "accepted = passes.long().sum(-1)  # the leading ones",
        "tokens after a rejected one are accepted",
        "test_rule.py::test_verify_draws_from_the_enumerated_law",
    ),
    (
        "q = torch.nn.functional.pad(q, (0, 0, 0, 1))",
        "q = torch.cat([q, q[..., -1:, :]], -2)",
        "after a whole draft the token comes from a residual, not from p",
        "test_rule.py::test_verify_draws_from_the_enumerated_law",
    ),
    (
        "return accepted, sample(following, u[..., -1])",
        "return accepted, sample(following, u[..., 0])",
        "the uniform that judged a token also draws the next one",
        "test_rule.py::test_verify_draws_from_the_enumerated_law",
    ),
    (
        "node = deepest(tokens == choice[shape.parents], shape)  # which does not ask the root",
        "node = deepest(tokens == choice, shape)  # which does not ask the root",
        "a node is compared with the choice after itself, not after its parent",
        "test_lossless.py::test_greedy_text_is_the_targets_own",
    ),
    (
        "if draft.q is None:\n        return *match",
        "if False:\n        return *match",
        "named tokens are judged as if they were drawn",
        "test_lossless.py::test_a_head_reads_the_text_and_the_states_before_each_token",
    ),
)
DECODER = of(
    "speculate.py",
    (
        "depth = min(plan.depth, limit - len(out.tokens) - 1)",
        "depth = min(plan.depth, limit - len(out.tokens))",
        "a text is a token longer than asked for",
        "test_lossless.py::test_a_limit_cuts_the_same_text",
    ),
    (
        "cache.keep(start, kept, in_place=path[-1] == len(path) - 1)",
        "cache.keep(start, kept, in_place=True)",
        "the path accepted in a tree is not moved to its places",
        "test_drafts.py::test_greedy_text_by_a_tree_of_any_shape_is_the_targets_own",
    ),
    (
        "known.add(new, written, hidden)",
        "known.add(new, written, hidden.roll(1, 1))",
        "the head reads tokens with the states after others",
        "test_lossless.py::test_a_head_reads_the_text_and_the_states_before_each_token",
    ),
    (
        "out.uncut_cycles += depth == plan.depth and not cut",
        "out.uncut_cycles += 1",
        "cycles that the end of a text cut count in tau",
        "test_lossless.py::test_the_last_token_before_the_limit_is_not_drafted",
    ),
    (
        "new = new[: 1 + min(new.index(stop) for stop in stops & set(new))]",
        "new = new[: min(new.index(stop) for stop in stops & set(new))]",
        "the stop token is lost",
        "test_lossless.py::test_a_stop_token_inside_an_accepted_run_ends_the_text_there",
    ),
    (
        "known.add(out.tokens, torch.cat([prompt[1:], last[None]]), hidden)",
        "known.add(out.tokens, torch.cat([prompt[:-1], last[None]]), hidden)",
        "the head reads the prompt with the states before its tokens",
        "test_lossless.py::test_a_head_reads_the_text_and_the_states_before_each_token",
    ),
    (
        "return sum(counted) / len(counted) if counted else math.nan",
        "return sum(counted) / max(1, len(counted) - 1) if counted else math.nan",
        "tau is too good",
        "test_lossless.py::test_a_perfect_head_writes_gamma_plus_one_tokens_a_cycle",
    ),
)
CACHE = of(
    "model.py",
    (
        "self.keys[layer, :, :, self.length : end] = keys",
        "self.keys[layer, :, :, : keys.shape[2]] = keys",
        "keys overwrite the beginning of the text",
        "test_model.py::test_reading_in_pieces_is_reading_at_once",
    ),
    (
        "stored[..., start : self.length, :] = stored[..., start + path, :]",
        "stored[..., start : self.length, :] = stored[..., path, :]",
        "the kept path is taken from the beginning of the text",
        "test_drafts.py::test_keeping_a_path_is_having_read_that_path_only",
    ),
    (
        "self.rollback(start + len(path))",
        "self.rollback(start + len(path) - 1)",
        "the last accepted token is forgotten",
        "test_drafts.py::test_keeping_a_path_is_having_read_that_path_only",
    ),
    (
        "            first = len(self.causal) // 2 - end\n",
        "            first = len(self.causal) // 2 - end - 1\n",
        "each position sees the token after it",
        "test_model.py::test_reading_in_pieces_is_reading_at_once",
    ),
    (
        "unseen = torch.zeros_like(seen, dtype=self.causal.dtype).masked_fill_(~seen, -math.inf)",
        "unseen = torch.zeros_like(seen, dtype=self.causal.dtype)",
        "the nodes of a tree see each other",
        "test_drafts.py::test_each_node_is_read_as_the_end_of_its_own_path",
    ),
    (
        "qk = torch.addcmul(qk * cos, qk.roll(self.head_dim // 2, dims=-1), sin)",
        "qk = torch.addcmul(qk * cos, qk.roll(1, dims=-1), sin)",
        "the wrong coordinates are rotated together",
        "test_model.py::test_the_model_is_the_llama_architecture",
    ),
)
PLANS = of(
    "sampling.py",
    (
        "return log_q.double().nan_to_num(nan=LEAST).clamp(LEAST, -1e-9)",
        "return log_q.double()",
        "NaN ranks first, and a node at probability 1 ties with its parent",
        "test_faults.py::test_a_draft_that_is_no_number_does_not_change_the_text",
    ),
    (
        "self.distribution(logits.float().nan_to_num(nan=torch.finfo(torch.float32).min))",
        "self.distribution(logits)",
        "a token is drawn from NaN, beyond the vocabulary",
        "test_faults.py::test_a_draft_that_is_no_number_does_not_change_the_text",
    ),
)
PLANS += of(
    "drafts.py",
    (
        "whole_path = (shape.ancestors[:, 1:] <= agrees[1:]).all(1)",
        "whole_path = agrees",
        "a node is accepted whose ancestor was not",
        "test_drafts.py::test_the_deepest_node_is_on_a_path_that_agrees_all_the_way",
    ),
    (
        "kept = scores.topk(self.size(scores)).indices.sort().values",
        "kept = scores.topk(self.size(scores)).indices",
        "nodes come before their parents",
        "test_drafts.py::test_a_growing_tree_holds_the_likeliest_continuations",
    ),
    (
        "above = best + seen",
        "above = best",
        "nodes are hung below others",
        "test_drafts.py::test_a_growing_tree_holds_the_likeliest_continuations",
    ),
    (
        "if self.unread:",
        "if len(self.unread) > 1:",
        "the head misses what it has not read",
        "test_lookup.py::test_a_head_drafts_after_a_backlog_as_one_that_reads_the_text_at_once",
    ),
    (
        "self.after[tuple(text[self.entered - n : self.entered])] = self.entered",
        "self.after.setdefault(tuple(text[self.entered - n : self.entered]), self.entered)",
        "the earliest copy is taken, not the latest",
        "test_lookup.py::test_what_followed_the_longest_and_latest_match_is_copied",
    ),
    (
        "for n in range(min(LONGEST, len(text)), least - 1, -1):",
        "for n in range(least, min(LONGEST, len(text)) + 1):",
        "the shortest match is taken, not the longest",
        "test_lookup.py::test_what_followed_the_longest_and_latest_match_is_copied",
    ),
    (
        "text.append(text[place - len(known.tokens) + len(text)])",
        "text.append(text[-1])",
        "a copy that reaches the end of the text repeats one token",
        "test_lookup.py::test_what_followed_the_longest_and_latest_match_is_copied",
    ),
    (
        "        if len(path) < depth:\n            heapq",
        "        if len(path) <= depth:\n            heapq",
        "a tree is a level deeper than may be drafted",
        "test_drafts.py::test_the_best_tree_of_a_head_without_second_guesses_is_a_chain",
    ),
)
HEADS = of(
    "draft_head.py",
    (
        "state.cache.rollback(state.length)\n        state.hidden",
        "state.hidden",
        "drafted keys stay where certain ones belong",
        "test_model.py::test_drafting_leaves_no_trace_in_what_is_absorbed_next",
    ),
    (
        "state.nodes = self.step(tokens, nodes.expand(-1, k, -1), state.cache, rotary)",
        "state.nodes = self.step(tokens, state.feature.expand(-1, k, -1), state.cache, rotary)",
        "a node is read with the state of the text, not of the node before it",
        "test_model.py::test_eagle_reads_each_drafted_token_with_the_state_it_guessed",
    ),
    (
        "guesses.append(batch.rows(states[:, own:], own + 1))",
        "guesses.append(batch.rows(states[:, : states.shape[1] - own], own + 1))",
        "a guess is compared with another place's state",
        "test_model.py::test_the_training_form_is_the_decoding_form",
    ),
    (
        "return torch.cat([before >= own, *(before == own - j for j in range(1, own + 1))], 1)",
        "return torch.cat([before >= 0, *(before == own - j for j in range(1, own + 1))], 1)",
        "in training a guess sees true states that drafting would not have",
        "test_model.py::test_the_training_form_is_the_decoding_form",
    ),
    (
        "u = u + F.silu(torch.baddbmm(bias, u, weight))",
        "u = F.silu(torch.baddbmm(bias, u, weight))",
        "a layer of Medusa has lost its residual path",
        "test_model.py::test_an_untrained_medusa_head_repeats_the_targets_own_guess",
    ),
)
GAME = of(
    "train.py",
    (
        "loss = self.d_loss(guess.detach(), batch)",
        "loss = self.d_loss(guess, batch)",
        "D's step is not one of D alone: a gradient is asked for that reaches the head",
        "test_training.py::test_a_joint_step_is_one_of_D_and_then_one_of_the_head",
    ),
    (
        'weight, figures = self.weight if part == "joint" else 0.0, {}',
        "weight, figures = self.weight, {}",
        "D plays before it has learnt",
        "test_training.py::test_until_D_has_learnt_the_head_is_trained_without_it",
    ),
    (
        "update(self.optimizer, self.head_lr * rate, loss, clip=True)",
        "update(self.optimizer, self.head_lr, loss, clip=True)",
        "the head's rate does not follow the schedule",
        "test_training.py::test_the_discriminator_slows_down_with_the_head",
    ),
    (
        "update(self.d_optimizer, self.discriminator_lr * rate, loss)",
        "update(self.d_optimizer, self.discriminator_lr, loss)",
        "D leaps beside a head at rest",
        "test_training.py::test_the_discriminator_slows_down_with_the_head",
    ),
    (
        'h_to = state if self.form == "blind" else h_to - state',
        'h_to = state if self.form == "blind" else state - h_to',
        "D is shown its lesson the wrong way round",
        "test_training.py::test_a_joint_step_is_one_of_D_and_then_one_of_the_head",
    ),
    (
        "h_to = batch.rows(batch.hidden[:, i:], i)",
        "h_to = batch.rows(batch.hidden[:, :-i], i)",
        "p is that of another place",
        "test_training.py::test_a_guess_is_compared_with_the_targets_law_for_the_same_token",
    ),
    (
        "yield i - 1, self.head.position_weights[i - 1], rows, to_logits.to(self.lm_head.dtype)",
        "yield i - 1, 1.0, rows, to_logits.to(self.lm_head.dtype)",
        "all draft positions weigh alike",
        "test_training.py::test_the_loss_is_the_mean_over_what_is_to_be_learnt",
    ),
    (
        "if not batch.learn[:, positions + 1 :].any():",
        "if not batch.learn.any():",
        "a batch without rows for the last position makes a loss that is no number",
        "test_training.py::test_a_batch_is_learnt_from_if_each_draft_position_has_a_row",
    ),
    (
        "return exact_logits(p, q)",
        "return exact_logits(q, p)",
        "the best D calls the head's tokens the target's",
        "test_training.py::test_a_joint_step_is_one_of_D_and_then_one_of_the_head",
    ),
)
GAME += of(
    "discriminator.py",
    (
        "return -(q * F.logsigmoid(logits.detach())).sum(-1).mean()",
        "return -(q.detach() * F.logsigmoid(logits)).sum(-1).mean()",
        "the lesson does not reach the head",
        "test_training.py::test_each_side_learns_from_its_own_loss_only",
    ),
    (
        "fake = (q.detach() * F.logsigmoid(-logits)).sum(-1)  # 1 - sigmoid(s) = sigmoid(-s)",
        "fake = (q.detach() * F.logsigmoid(logits)).sum(-1)  # 1 - sigmoid(s) = sigmoid(-s)",
        "D is told that both sides are the target's",
        "test_training.py::test_no_other_discriminator_does_better",
    ),
    (
        "return F.linear(g, self._frozen[0]) + b",
        "return F.linear(g, self._frozen[0])",
        "D has no bias",
        "test_training.py::test_a_new_discriminator_is_undecided_and_owns_no_lm_head",
    ),
)
FIGURES = of(
    "costs.py",
    (
        "alpha[i] += acceptance(head.vocabulary.rows(p.T).T, q).sum().item()",
        "alpha[i] += acceptance(q, q).sum().item()",
        "acceptance is measured as 1",
        "test_training.py::test_a_perfect_head_is_measured_as_perfect_and_a_contrary_one_as_useless",
    ),
    (
        "use = learn[:, start + 1 : start + positions + 1].all(1)  # (B,)",
        "use = learn[:, start + 1 : start + positions + 1].any(1)  # (B,)",
        "drafts count whose tokens are not to be learnt",
        "test_training.py::test_only_drafts_of_what_is_to_be_learnt_are_measured",
    ),
    (
        'result["tau_estimate"] = math.nan if diverged else 1 + agree.cumprod(0).sum().item()',
        'result["tau_estimate"] = math.nan if diverged else 1 + agree.sum().item()',
        "tokens count after a rejected one",
        "test_training.py::test_the_first_position_is_measured_as_training_sees_it",
    ),
    (
        "here = start + i\n            logits = head.expand(state, tokens[:, here, None])",
        "here = start + i - 1\n            logits = head.expand(state, tokens[:, here, None])",
        "a draft follows other tokens than the text's",
        "test_training.py::test_a_perfect_head_is_measured_as_perfect_and_a_contrary_one_as_useless",
    ),
)
FIGURES += of(
    "study/replay.py",
    (
        "ends = reach * (1 - chance)",
        "ends = reach * chance",
        "cycles end where tokens are accepted",
        "test_replay.py::test_sampled_cycles_are_those_of_the_decoder_on_average",
    ),
    (
        "if plan.depth <= left:",
        "if True:",
        "cycles that the limit cut count in tau",
        "test_replay.py::test_greedy_cycles_are_those_of_the_decoder",
    ),
    (
        "((own[:, 0] >= 0) | (reach[:, 0] > worst))",
        "(own[:, 0] >= 0)",
        "better nodes are not counted once the text has left the beam",
        "test_replay.py::test_greedy_cycles_are_those_of_the_decoder",
    ),
    (
        "q.gather(-1, following[:, None])[:, 0] / text.p[i:]",
        "q.gather(-1, following[:, None])[:, 0] / text.p[i - 1 : -1]",
        "q of a token is compared with p of the one before",
        "test_replay.py::test_sampled_cycles_are_those_of_the_decoder_on_average",
    ),
    (
        "device=tokens.device) < roots[:, None]",
        "device=tokens.device) <= roots[:, None]",
        "a draft reads the token that it is to guess",
        "test_replay.py::test_greedy_cycles_are_those_of_the_decoder",
    ),
    (
        "rank[depth - 1] < part.nodes",
        "rank[depth - 1] <= part.nodes",
        "a tree has a node more than it has room for",
        "test_replay.py::test_greedy_cycles_are_those_of_the_decoder",
    ),
)
FIGURES += of(
    "study/judge.py",
    (
        "accepted[use] = (named == following[use, None]).any(-1)",
        "accepted[use] = True",
        "a judge learns from nodes that no draft comes to",
        "test_judge.py::test_verdicts_are_those_of_the_target_after_the_tokens_before",
    ),
    (
        "use = learn[:, here + 1] & (accepted if i > 0 else True)  # (B,)",
        "use = learn[:, here + 1]  # (B,)",
        "a judge learns from nodes after rejected ones",
        "test_judge.py::test_verdicts_are_those_of_the_target_after_the_tokens_before",
    ),
)
FIGURES += of(
    "study/foresight.py",
    (
        "del plan.made[round(cycles) :]",
        "pass",
        "a cycle that the end of a text cut costs, and brings nothing",
        "test_judge.py::test_a_cycle_that_a_stop_token_cuts_costs_nothing",
    ),
    (
        "return written / float((self.verify[nodes] + self.draft[steps]).sum())",
        "return written / float((self.verify[nodes - 1] + self.draft[steps]).sum())",
        "the root is verified for nothing",
        "test_judge.py::test_a_speed_is_tokens_over_the_costs_of_their_cycles",
    ),
)
FILES = of(
    "plumbing/files.py",
    (
        'return path.with_name(f"{path.name}.{here}.{os.getpid()}.part")',
        'return path.with_name(f"{path.name}.{here}.1.part")',
        "two processes write to one scratch file",
        "test_faults.py::test_two_processes_that_save_one_file_leave_it_whole_at_any_time",
    ),
    (
        "os.replace(scratch, path)",
        "path.write_bytes(scratch.read_bytes())",
        "a reader can see half a file",
        "test_faults.py::test_two_processes_that_save_one_file_leave_it_whole_at_any_time",
    ),
    (
        "weights_only=True",
        "weights_only=False",
        "a checkpoint may run code",
        "test_model.py::test_code_in_a_checkpoint_is_not_executed",
    ),
    (
        "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        "two commands write to one folder",
        "test_faults.py::test_a_second_writer_is_told_who_writes",
    ),
    (
        "except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:",
        "except (TypeError, ValueError, RuntimeError, AttributeError) as error:",
        "a checkpoint that lacks a part is a KeyError",
        "test_faults.py::test_a_checkpoint_of_another_version_is_named",
    ),
)
FILES += of(
    "plumbing/early.py",
    (
        "        os._exit(130)",
        "        raise KeyboardInterrupt",
        "an interrupt during the imports is a traceback, or dropped within a callback",
        "test_faults.py::test_an_interrupt_while_torch_is_imported_is_one_line",
    ),
    (
        "if of_a_script():",
        "if True:",
        "who imports the project loses his signals",
        "test_faults.py::test_an_interrupt_while_torch_is_imported_is_one_line",
    ),
)
FILES += of(
    "plumbing/cli.py",
    (
        "        signal.signal(number, signal.default_int_handler)",
        "        pass",
        "an interrupt in the middle of the work leaves it half done",
        "test_faults.py::test_an_interrupt_after_the_imports_leaves_nothing_half_done",
    ),
)
FILES += of(
    "plumbing/progress.py",
    (
        "        with as_other_version(self.path):",
        "        if True:",
        "unfinished training of another version is a traceback",
        "test_faults.py::test_unfinished_training_of_another_version_is_named",
    ),
)
FILES += of(
    "plumbing/files.py",
    (
        "        for part in PARTS.get(kind, ()):",
        "        for part in ():",
        "a head without its record is a traceback after all the training",
        "test_faults.py::test_a_damaged_head_beside_others_is_named",
    ),
    (
        "    except (UserError, torch.OutOfMemoryError):",
        "    except UserError:",
        "who runs out of memory is told to train anew",
        "test_faults.py::test_out_of_memory_is_not_another_version",
    ),
)
FILES += of(
    "model.py",
    (
        "        if end > self.max_length:",
        "        if False:",
        "a token beyond a full cache is lost in silence",
        "test_model.py::test_a_full_cache_takes_no_more",
    ),
)
FILES += of(
    "train.py",
    (
        'if self.labels == "soft" else batch.learn',
        "if self.head.learns_p else batch.learn",
        "a head of tokens learns those of the user, too",
        "test_training.py::test_who_learns_p_learns_from_every_token_and_who_learns_tokens_from_the_targets_own",
    ),
)
FILES += of(
    "targets/runs.py",
    (
        '        build_head(shape, target).load_state_dict(checkpoint["weights"])',
        "        pass",
        "--init is refused by a traceback, after the text is written",
        "test_faults.py::test_a_checkpoint_that_lacks_a_part_is_named_while_training",
    ),
)
FILES += of(
    "targets/written.py",
    (
        "    with only_writer(folder):\n        written = Conversations(folder, about)",
        "    if True:\n        written = Conversations(folder, about)",
        "two processes write the same texts at once",
        "test_faults.py::test_a_study_refuses_what_is_being_written",
    ),
)
FILES += of(
    "study/ablation.py",
    (
        "        with only_writer(folder, one.head):",
        "        if True:",
        "two studies train the same head at once",
        "test_faults.py::test_a_study_refuses_what_is_being_written",
    ),
)
FILES += of(
    "study/gpu.py",
    (
        'if before and before["ended"] == "done" and before["command"] == command:',
        'if before and before["ended"] == "done":',
        "a step of other settings is taken for done",
        "test_gpu.py::test_what_succeeded_is_not_run_again",
    ),
    (
        "for number in (signal.SIGINT, signal.SIGKILL):",
        "for number in (signal.SIGKILL,):",
        "a training that is cut keeps nothing",
        "test_gpu.py::test_a_step_says_how_it_ended",
    ),
)
FILES += of(
    "study/report.py",
    (
        'of its own)." if is_padded(result) else "layers."',
        'of its own)."',
        "a target's own layers are called padded",
        "test_depth.py::test_where_a_second_layer_pays_is_told_and_whether_that_target_is_padded",
    ),
)
FILES += of(
    "study/depth.py",
    (
        "more = [depth for depth in depths if depth > int(own)]",
        "more = []",
        "a second target is measured at its own depth alone, not padded",
        "test_depth.py::test_one_command_measures_it_all_and_goes_on",
    ),
)
FILES += of(
    "study/prompts.py",
    (
        'path.read_text("utf-8-sig").split("\\n"), start=1)',
        'path.read_text("utf-8-sig").splitlines(), start=1)',
        "JSON is cut at characters that it may hold",
        "test_faults.py::test_prompt_files_are_cut_at_line_breaks_alone",
    ),
    (
        '            "".join([category, *texts]).encode()',
        "            pass",
        "half a character cannot be written, once all is measured",
        "test_faults.py::test_half_a_character_is_refused_by_its_line",
    ),
)
FILES += of(
    "targets/text.py",
    (
        "            if (print_of := digest(text)) in seen:",
        "            if (print_of := digest(text)) is None:",
        "a text by two names is learnt and tested",
        "test_faults.py::test_the_same_text_by_two_names_is_read_once",
    ),
    (
        "        splits = by_shares(documents)",
        "        pass",
        "few files leave a part almost empty",
        "test_faults.py::test_every_part_has_its_share_however_few_and_long_the_files",
    ),
    (
        'hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()',
        "hashlib.sha256(text.encode()).hexdigest()",
        "a file name that is no UTF-8 is a traceback",
        "test_faults.py::test_file_names_that_are_no_utf8_are_read_like_any_other",
    ),
)
RECORDED = of(
    "targets/graphs.py",
    (
        "self.values[layer].index_copy_(2, self.slots, values)",
        "self.values[layer].index_copy_(2, self.slots - self.slots[0], values)",
        "a recorded pass writes where the first one did",
        "test_graphs.py::test_texts_are_those_of_passes_that_are_not_recorded",
    ),
    (
        "self.mask.fill_(-math.inf)",
        "self.mask",
        "a recorded pass sees what an earlier draft or text left in the cache",
        "test_graphs.py::test_texts_are_those_of_passes_that_are_not_recorded",
    ),
    (
        "torch.arange(start, start + count, out=self.places.slots)",
        "self.places.slots = torch.arange(start, start + count)",
        "a recording goes on with the places of its first pass",
        "test_graphs.py::test_texts_are_those_of_passes_that_are_not_recorded",
    ),
    (
        "whole.values.zero_()",
        "pass",
        "values that are no numbers outlive their text",
        "test_graphs.py::test_a_cache_without_room_is_refused_and_a_used_one_is_clean",
    ),
    (
        "return self.replay().clone()",
        "return self.replay()",
        "the next replay overwrites states that are still needed",
        "test_graphs.py::test_an_output_outlives_the_next_replay",
    ),
    (
        "whole = free.pop() if free else make(size)",
        "whole = free[-1] if free else make(size)",
        "two texts at once write to one cache",
        "test_graphs.py::test_two_texts_at_once_have_caches_of_their_own",
    ),
    (
        "            size *= 2",
        "            size = length",
        "every length of text records passes of its own",
        "test_graphs.py::test_two_texts_at_once_have_caches_of_their_own",
    ),
)

ELSEWHERE = of(
    "targets/loading.py",
    (
        "    check_numbers(target, folder)",
        "    pass",
        "a target that overflows writes token 0 for ever",
        "test_faults.py::test_a_target_that_overflows_is_refused_when_it_is_loaded",
    ),
)
ELSEWHERE += of(
    "targets/small.py",
    (
        "    if not math.isfinite(bits):",
        "    if False:",
        "a target that diverged is saved",
        "test_faults.py::test_a_target_that_diverged_is_not_saved",
    ),
)
ELSEWHERE += of(
    "targets/features.py",
    (
        "    if not states.isfinite().all():",
        "    if False:",
        "a head learns from inf",
        "test_faults.py::test_states_too_large_for_their_file_are_no_lesson",
    ),
)
ELSEWHERE += of(
    "targets/bpe.py",
    (
        "tokens += encoding.encode(part, **found)",
        "tokens += encoding.encode_ordinary(part)",
        "an added token is cut like any other text",
        "test_faults.py::test_added_tokens_are_found_in_any_text_and_control_tokens_are_not",
    ),
    (
        'encoding.stops = frozenset({encoding.eot_token, *tokenizer.get("ends", ())})',
        "encoding.stops = frozenset({encoding.eot_token})",
        "a text ends at one of its ends alone",
        "test_pretrained.py::test_an_answer_ends_at_any_token_that_the_model_calls_an_end",
    ),
)
ELSEWHERE += of(
    "targets/chat.py",
    (
        "self.stops = frozenset({self.stop, *ends})",
        "self.stops = frozenset({self.stop})",
        "an answer ends at one of its ends alone",
        "test_pretrained.py::test_an_answer_ends_at_any_token_that_the_model_calls_an_end",
    ),
    (
        "if trusted and part in self.encoding.special_tokens_set:",
        "if part in self.encoding.special_tokens_set:",
        "a message can end a turn by spelling its end",
        "test_chat.py::test_what_a_user_types_never_becomes_a_special_token",
    ),
)
ELSEWHERE += of(
    "targets/tokenizers.py",
    (
        "    if joined != sorted(joined):",
        "    if False:",
        "merges in another order join other pairs",
        "test_pretrained.py::test_what_would_not_come_out_exactly_is_refused_by_name",
    ),
    (
        "if other != token and (other.startswith(token) or token.startswith(other)):",
        "if other != token and other.startswith(token):",
        "an added token is lost behind a special one",
        "test_pretrained.py::test_what_would_not_come_out_exactly_is_refused_by_name",
    ),
    (
        "            if best == len(merges):",
        "            if False:",
        "a token that no merges make is used",
        "test_pretrained.py::test_what_would_not_come_out_exactly_is_refused_by_name",
    ),
    (
        "added = {token: i for i, token in enumerate(tokens) if kinds[i] == ADDED}",
        "added = {}",
        "an added token of a GGUF file is cut like any other text",
        "test_pretrained.py::test_an_added_token_is_found_in_any_text",
    ),
)
ELSEWHERE += of(
    "targets/pretrained.py",
    (
        "            values = values.view(-1, pairs, 2, values.shape[-1]).transpose(1, 2).flatten(0, 2)",
        "            pass",
        "the coordinates of a rotated pair stay side by side",
        "test_pretrained.py::test_an_imported_target_is_the_model_that_was_written",
    ),
    (
        "        if not (unused or close or value == expected):",
        "        if False:",
        "a setting that changes the model is passed over",
        "test_pretrained.py::test_what_would_not_come_out_exactly_is_refused_by_name",
    ),
    (
        "        unused = not value and expected is not True",
        "        unused = not value",
        "a model that sees what follows is taken for one that does not",
        "test_pretrained.py::test_what_would_not_come_out_exactly_is_refused_by_name",
    ),
    (
        '    given |= {"tools": None, "documents": None}',
        "    pass",
        "a template takes tools that nobody told it of for some",
        "test_pretrained.py::test_a_template_is_given_what_transformers_gives_it",
    ),
    (
        "    both = [settings, read_json(more) if more.is_file() else {}]",
        "    both = [settings]",
        "Llama 3 goes on after its turn",
        "test_pretrained.py::test_an_answer_ends_at_any_token_that_the_model_calls_an_end",
    ),
    (
        "    if unread:",
        "    if False:",
        "a bias is left out",
        "test_pretrained.py::test_what_would_not_come_out_exactly_is_refused_by_name",
    ),
    (
        'where = {name: path for name, path in where.items() if not name.endswith(".inv_freq")}',
        "pass",
        "tables of rotations are taken for weights",
        "test_pretrained.py::test_an_imported_target_is_the_model_that_was_written",
    ),
)


def answers(number: int, file: str, *rows) -> list[Mutation]:
    """Wrong answers to an exercise, which its own checks have to see."""
    tests = EXERCISES[number].tests
    return [Mutation(file, line, wrong, tests, why) for line, wrong, why in rows]


ANSWERS = answers(
    1,
    "sampling.py",
    (
        "return (p_x / q_x).clamp(max=1.0)",
        "return p_x.clamp(max=1.0)",
        "drawn tokens are judged as named ones",
    ),
    (
        "excess = (p - q).clamp(min=0.0)",
        "excess = (p - q).abs()",
        "what q has too much of is drawn again",
    ),
)
ANSWERS += answers(
    2,
    "speculate.py",
    (
        "passes = u[..., :-1] < acceptance_probability(p_x, q_x)",
        "passes = u[..., 1:] < acceptance_probability(p_x, q_x)",
        "a token is judged by the uniform of the next one",
    ),
    (
        "following = residual(p.gather(-2, row), q.gather(-2, row))[..., 0, :]",
        "following = p.gather(-2, row)[..., 0, :]",
        "the token after a rejection comes from p",
    ),
)
ANSWERS += answers(
    3,
    "sampling.py",
    (
        "return (p_x / q_x).clamp(max=1.0)",
        "return (1.5 * p_x / q_x).clamp(max=1.0)",
        "the cheat itself",
    ),
)
ANSWERS += answers(
    4,
    "speculate.py",
    (
        "    return node, choice[node]",
        "    return node, choice[shape.parents[node]]",
        "the last accepted token is written twice",
    ),
)
ANSWERS += answers(
    4,
    "drafts.py",
    (
        "return (whole_path * shape.depth).argmax(0)",
        "return whole_path.long().argmax(0)",
        "the first node that agrees, not the deepest",
    ),
)
ANSWERS += answers(
    5,
    "drafts.py",
    (
        "parents, depth = parents[parents], depth // 2",
        "parents, depth = parents, depth // 2",
        "the rounds do not double: deep nodes lose their first ancestors",
    ),
    (
        "seen = torch.eye(len(parents), dtype=torch.bool, device=parents.device)",
        "seen = torch.ones(len(parents), len(parents), dtype=torch.bool).tril()",
        "a node sees its elder siblings",
    ),
)
ANSWERS += answers(
    5,
    "model.py",
    (
        "        self.length = length\n\n    def keep",
        "        self.keys[..., length:, :] = 0\n\n    def keep",
        "what was forgotten is emptied, and still counts",
    ),
    (
        "stored[..., start : self.length, :] = stored[..., start + path, :]",
        "stored[..., start : self.length, :] = stored[..., path, :]",
        "places are counted from the beginning of the text",
    ),
)
ANSWERS += answers(
    6,
    "drafts.py",
    (
        "for n in range(min(LONGEST, len(text)), least - 1, -1):",
        "for n in range(least, min(LONGEST, len(text)) + 1):",
        "the shortest match is taken, not the longest",
    ),
    (
        "while self.entered + 1 < len(text):  #",
        "while self.entered < len(text):  #",
        "the text's own end is found, which nothing follows",
    ),
    (
        "text.append(text[place - len(known.tokens) + len(text)])",
        "text.append(text[0])",
        "a copy at the end of the text does not go round",
    ),
)
ANSWERS += answers(
    7,
    "speculate.py",
    (
        "depth = min(plan.depth, limit - len(out.tokens) - 1)",
        "depth = plan.depth",
        "more is written than was asked for",
    ),
)
ANSWERS += answers(
    8,
    "draft_head.py",
    (
        "            u = u + F.silu(torch.baddbmm(bias, u, weight))",
        "            u = F.silu(torch.baddbmm(bias, u, weight))",
        "no residual: an untrained head is not the target's own",
    ),
    (
        "u = self.combine(torch.cat([embedded, hidden], dim=-1))",
        "u = self.combine(torch.cat([hidden, embedded], dim=-1))",
        "states are read as embeddings",
    ),
    (
        "outputs = batch.rows(batch.hidden[:, 1:], 1).double()",
        "outputs = batch.rows(batch.hidden[:, :-1], 1).double()",
        "it is solved for the state it was given",
    ),
)
ANSWERS += answers(
    9,
    "discriminator.py",
    (
        "return (p.clamp_min(tiny).log() - q.clamp_min(tiny).log()).detach()",
        "return p.clamp_min(tiny).log() - q.clamp_min(tiny).log()",
        "the head changes D to please it",
    ),
    (
        "fake = (q.detach() * F.logsigmoid(-logits)).sum(-1)",
        "fake = (q.detach() * F.logsigmoid(logits)).sum(-1)",
        "D learns to take all for real",
    ),
    (
        "return -(q * F.logsigmoid(logits.detach())).sum(-1).mean()",
        "return -(q.detach() * F.logsigmoid(logits)).sum(-1).mean()",
        "the gradient goes through D, not through q",
    ),
)
ANSWERS += answers(
    9,
    "sampling.py",
    (
        "return torch.minimum(p, q).sum(-1)",
        "return (p * q).sum(-1)",
        "the chance that two draws are equal",
    ),
)
ANSWERS += answers(
    10,
    "train.py",
    (
        "loss = self.d_loss(guess.detach(), batch)",
        "loss = -self.d_loss(guess.detach(), batch)",
        "D learns to be wrong",
    ),
    (
        "update(self.optimizer, self.head_lr * rate, loss, clip=True)",
        "update(self.optimizer, self.head_lr, loss, clip=True)",
        "the head's rate does not fall",
    ),
    (
        "loss = self.head_loss(guess, batch, 1.0, weight)",
        "loss = self.head_loss(guess, batch, 1.0, self.weight)",
        "lambda counts before the game has begun",
    ),
)
ANSWERS += answers(
    11,
    "costs.py",
    (
        "        total += chance\n",
        "        total = 1.0 + chance\n",
        "the last node counts alone",
    ),
    (
        "return self.tau / (self.c_verify + self.c_draft)",
        "return self.tau / self.c_verify",
        "drafting is free",
    ),
    (
        "return max(sizes, key=lambda size: size.speedup)",
        "return max(sizes, key=lambda size: size.tau)",
        "tau is taken for speed",
    ),
)
ANSWERS += answers(
    12,
    "study/judge.py",
    (
        "tokens = (reach[:, None] * self.followed - self.speed * self.node).clamp(min=0).sum()",
        "tokens = (reach[:, None] * self.followed).sum()",
        "a step's tokens are wanted, and their verification is forgotten",
    ),
    (
        "return 1 + int((tokens - self.speed * self.verify[: len(tokens)]).argmax())",
        "return 1 + int((tokens / self.verify[: len(tokens)]).argmax())",
        "the best ratio of this one draft, not the speed of the text",
    ),
)


def blank(number: int, file: str, name: str) -> Mutation:
    """A function of an exercise as its student finds it."""
    source = (Path(__file__).parent.parent / file).read_text("utf-8")
    lines, node = source.splitlines(keepends=True), function(ast.parse(source), name)
    before, after = "".join(lines[: node.lineno - 1]), "".join(lines[node.end_lineno :])
    line, empty = source, emptied(source, [name], number)
    line, empty = (text[len(before) : len(text) - len(after)] for text in (line, empty))
    return Mutation(
        file, line, empty, EXERCISES[number].tests, f"exercise {number}: {name} is empty"
    )


BLANKS = [
    blank(number, file, name)
    for number, exercise in EXERCISES.items()
    for file, names in exercise.blanks.items()
    for name in names
    if not exercise.fails
]
MUTATIONS = RULES + DECODER + CACHE + PLANS + HEADS + GAME + FIGURES + FILES
MUTATIONS += RECORDED + ELSEWHERE
MUTATIONS += ANSWERS + BLANKS
