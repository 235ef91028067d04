"""What the tests of this project are made of, for use in tests of your own.

* :mod:`fastgen.testing.philox`: the engine's draws, bit for bit.
* :mod:`fastgen.testing.sampling`: logits processing, filters and the draw, in NumPy.
* :mod:`fastgen.testing.models`: small networks with seeded weights.
* :mod:`fastgen.testing.strategies`: hypothesis strategies (needs hypothesis).
* :mod:`fastgen.testing.paddlenlp`: PaddleNLP's ``generate`` driven with the same draws (needs
  PaddleNLP).
* :mod:`fastgen.testing.margins`: comparison, with the rule for undecided steps.
* :mod:`fastgen.testing.engine`: the engine on tensors in memory.

Nothing is imported here, so that NumPy is all that is needed for what needs no more.
"""
