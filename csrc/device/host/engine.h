// The engine of asynchronous work: copies and matrix products that go on while threads do other things.
//
// What an asynchronous operation is made of, here:
//
//   agent       who makes its accesses: a bit like a thread, with a clock of its own. Every mbarrier has one for the copies that
//               complete on it (its clock: the phase), a warpgroup has one for its products (its clock: the commit group).
//               make_agent(name) -> Agent&; agent.slot is its place among the block's threads in vector clocks.
//   mark        at issue, by the issuing thread: mark(p, region, bytes, use, agent.slot, clock, at) checks bounds, that the bytes
//               were written, that nobody else's access is unordered with it, that a proxy fence lies behind every thread's
//               write; and leaves the agent's name on the bytes. Until a thread knows that the agent's clock has passed, its own
//               accesses to these bytes are races: reads of what is written, writes of what is read.
//   learn       learn(agent.slot, clock): the running thread has waited, and knows. Barriers hand the knowledge on.
//   work        what is done to the bytes, now or later: later(Unit, chain, work). "Early" runs it at issue, so that what is given
//               free too early is overwritten; "late" keeps it until no thread of any block can go on, so that who did not wait
//               reads the old bytes. Work of one chain keeps its order; chains are mixed. Work must not fail: it may run
//               outside of any thread. done(chain) counts what has run, issued(chain) what was issued.
//   wait        wait_for_work(chain, count, what, at): until done(chain) >= count.
