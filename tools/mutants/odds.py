"Wrong versions of the leave-one-out attacker: the laws, what they add up to, and the watch."
from .mutant import Mutant

MUTANTS = [
    # mechanisms/law
    Mutant("mechanisms/law", "subsets keep the example", "leaving an example out leaves it in its subsets",
           "less = (self.means * sizes - self.g[:, None])", "less = (self.means * sizes - 0 * self.g[:, None])"),
    Mutant("mechanisms/law", "from every subset", "an example is taken out of subsets that it is not in",
           "return np.where(member, np.where(sizes > 1, less, 0.), self.means)",
           "return np.where(sizes > 1, less, self.means)"),
    Mutant("mechanisms/law", "odds upside down", "what speaks for an example speaks against it",
           "return np.where(q == p, 0., np.log(p) - np.log(q))", "return np.where(q == p, 0., np.log(q) - np.log(p))"),
    Mutant("mechanisms/law", "the sign is not looked at", "odds of +1, whatever was released",
           "p, q = (p, q) if sign > 0 else (1 - p, 1 - q)", "p, q = p, q"),
    Mutant("mechanisms/law", "another pool's transcript", "an impossible release is taken for an unlikely one",
           "    if p <= 0: raise ImpossibleRelease(\"this pool never releases that bit\")",
           "    p = max(p, 1e-300)"),
    Mutant("mechanisms/law", "a coin is certain", "where subsets disagree, +1 is certain",
           "np.where(share == 0, 0., .5)", "np.where(share == 0, 0., 1.)"),
    Mutant("mechanisms/law", "a mean is a sign", "of a real number only the sign is used",
           "    if signal.startswith('raw'): return np.abs(means - release.scalar) <= 1e-12 * scale\n", ""),
    # mechanisms/mi_law
    Mutant("mechanisms/mi_law", "no belief", "a pool's releases do not move its belief",
           "    self.belief[rows] += np.where(noisy[:, None], learned, 0.)\n", ""),
    Mutant("mechanisms/mi_law", "nothing is spent", "the noise does not follow what is left of the budget",
           "    self.spent[rows[noisy]] += binary_channel_mi(q[noisy], sigma[noisy])\n", ""),
    Mutant("mechanisms/mi_law", "noisy looks free", "a number may come from a pool whose subsets agree",
           "return np.where(noisy[1:], dens[0] - dens[1:], np.inf)",
           "return np.where(noisy[1:], dens[0] - dens[1:], 0.)"),
    # mechanisms/dp_law
    Mutant("mechanisms/dp_law", "always in the batch", "an example of the pool is in every batch",
           "llr = np.logaddexp(np.log1p(-self.rate), np.log(self.rate) + exponent)", "llr = exponent"),
    Mutant("mechanisms/dp_law", "its own part stays", "the others' sum has the example in it",
           " + np.where(inside, v, 0.)      # (K, n)", " + 0 * v      # (K, n)"),
    # audit/leave_one_out
    Mutant("audit/leave_one_out", "success of the last step", "only the last step's odds count",
           "self.llr = self.llr + llr", "self.llr = llr"),
    Mutant("audit/leave_one_out", "the prior twice", "the best guess gains from the prior again",
           "np.maximum(0, prior - (1 - prior) * np.exp(", "np.maximum(0, 1 - (1 - prior) * np.exp("),
    Mutant("audit/leave_one_out", "members are ruled out", "an impossible absence counts as an impossible presence",
           "return np.isposinf(self.llr)", "return np.isneginf(self.llr)", "nbs/rooms/audit/watch.ipynb"),
    # audit/watch
    Mutant("audit/watch", "for everybody's eyes", "the owner's files are readable by all",
           "replacing(Path(folder)/name, private=True)", "replacing(Path(folder)/name)"),
    Mutant("audit/watch", "a batch out of place", "a batch's numbers stand at the pool's beginning",
           "    out[:, rows] = seen\n", "    out[:, :len(rows)] = seen\n"),
    Mutant("audit/watch", "other data", "another pool's differences are taken for the run's",
           '    if task.fingerprint != told["fingerprint"]:\n', "    if False:\n"),
    Mutant("audit/watch", "secret batches are kept", "the record of a differentially private run is written",
           "        if run.mechanism.secret_batches: return\n", ""),
    # audit/zero
    Mutant("audit/zero", "the pool's mean is everybody's", "a real number is taken for every subset's own",
           'return bool(agree and signal == "quant_full")', 'return bool(agree and signal != "raw_half")'),
]
