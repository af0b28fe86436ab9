-- snapshot reads, at one instant, what outlives a restart of the embedded store: jobs,
-- tombstones and cursors. Everything else is reported again by nodes.
return {redis.call('HGETALL', jobs), redis.call('ZRANGE', tombs, 0, -1, 'WITHSCORES'), redis.call('HGETALL', cursors)}
