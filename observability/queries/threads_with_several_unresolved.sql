-- Which threads have more than one unresolved error, worst first?
SELECT
    thread_id,
    SUM(occurrences)::bigint AS unresolved,
    (ARRAY['info', 'warning', 'error', 'critical'])[
        MAX(CASE severity WHEN 'critical' THEN 4 WHEN 'error' THEN 3 WHEN 'warning' THEN 2 ELSE 1 END)
    ] AS worst_severity,
    ARRAY_AGG(DISTINCT error_type ORDER BY error_type) AS error_types,
    MIN(created_at) AS first_seen,
    MAX(COALESCE(last_seen_at, created_at)) AS last_seen
FROM system_errors
WHERE resolved_at IS NULL AND thread_id IS NOT NULL
GROUP BY thread_id
HAVING SUM(occurrences) > '1'/*:more_than*/::bigint
ORDER BY
    MAX(CASE severity WHEN 'critical' THEN 4 WHEN 'error' THEN 3 WHEN 'warning' THEN 2 ELSE 1 END) DESC,
    unresolved DESC,
    thread_id;
